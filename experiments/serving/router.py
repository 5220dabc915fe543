"""The router of a server with several engines: made at the door, and copied into each front."""

from __future__ import annotations

import pickle
from dataclasses import dataclass

from kvarena.engine.errors import ConfigError
from kvarena.engine.request import Request, SamplingParams
from kvarena.engine.routing import Router
from kvarena.experiments.settings.config import Part
from kvarena.experiments.settings.strategies import make_part

MOST_ENGINES = 64


@dataclass(frozen=True)
class _Idle:
    """An engine without a request, as a front would tell of it."""

    num_slots: int = 1
    num_sent: int = 0
    num_open: int = 0
    num_owned_slots: int = 0
    num_queued_tokens: int = 0
    num_tokens_to_compute: int = 0

    def cached_tokens(self, req: Request) -> int:  # noqa: ARG002 - of the protocol
        raise ConfigError(
            "this router asks what each cache holds, which a server's fronts do not know; take "
            "router=prefix_affinity or router=least_kv, or put `vllm-router --policy kv_aware` before several servers"
        )


def make_router(part: Part) -> Router:
    """The router that a config describes.

    Raises:
        ConfigError: an option out of range, more engines than a server has room for, or a router that a front cannot
            use: it asks what caches hold, or cannot be copied.
    """
    router: Router = make_part(Router, part)
    count = router.num_replicas
    if count > MOST_ENGINES:
        raise ConfigError(f"router.num_replicas={count} must be at most {MOST_ENGINES} behind one port")
    try:
        copy = pickle.loads(pickle.dumps(router))
    except Exception as error:
        raise ConfigError(f"{type(router).__name__} cannot be copied into the fronts: {error}") from error
    copy.route(Request("probe", [1], SamplingParams()), [_Idle()] * count)
    return router
