"""kvarena on a Ray cluster: our web app as ingress, and replicas that Ray places, restarts and scales.

client -HTTP-> Serve's proxy -> Ingress (our app: tokenize, JSON, SSE) -handle-> EngineReplica on any node
                                     '-- KVRouter picks the replica

serve run examples.ray_serve.app:build flags='MODEL_DIR --max-model-len 4096'
"""

from __future__ import annotations

import math
import shlex
from typing import Any

from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy, RequestRouterConfig
from ray.serve.handle import DeploymentHandle

from examples.ray_serve.engines import RayEngines
from examples.ray_serve.replica import EngineReplica
from examples.ray_serve.request_router import KVRouter
from kvarena.engine.errors import ConfigError
from kvarena.engine.server.front.dashboard import PoolFeed
from kvarena.engine.server.processes.front import make_app, make_service
from kvarena.engine.server.processes.process import ModelFiles
from kvarena.engine.server.shared import metrics
from kvarena.experiments.building.model_files import check_model
from kvarena.experiments.serving.flags import overrides_of, parse_flags
from kvarena.experiments.serving.words import in_flags
from kvarena.experiments.settings.compose import load_run

TARGET_KV = 0.6  # share of a pool in use that the autoscaler aims at


def by_kv_in_use(context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
    """As many replicas as bring the mean share of KV in use to `TARGET_KV`; at least the configured ones."""
    shares = list((context.aggregated_metrics or {}).get("kv_in_use", {}).values())
    wanted = context.target_num_replicas
    if shares:
        wanted = math.ceil(sum(map(float, shares)) / TARGET_KV)
    low, high = context.capacity_adjusted_min_replicas, context.capacity_adjusted_max_replicas
    return max(low, min(high, wanted)), {}


@serve.deployment
@serve.ingress()
class Ingress:
    """Our web app, in place of a front's process.

    Args:
        replicas: handle of the engines.
        flags: of `kvarena serve`.
    """

    def __init__(self, replicas: DeploymentHandle, flags: list[str]) -> None:
        self._replicas, self._flags = replicas, flags

    async def __serve_build_asgi_app__(self) -> Any:
        """The app, once a replica has said what it can do."""
        config = load_run(overrides_of(parse_flags(self._flags)))
        server, directory = config.server, check_model(config, tokenizer=True)
        assert server is not None
        rows = metrics.Rows(metrics.create_page(1), 1)
        rows.engines[0].set("state", metrics.READY)
        engines = RayEngines(self._replicas, await self._replicas.describe.remote(), server, rows)
        feed = PoolFeed()
        model = ModelFiles(str(directory), config.model.trust_remote_code, in_flags)
        service = await make_service(server, model, engines, rows.fronts[0][0], feed, None)
        feed.attach(engines, rows, service.model_names[0])
        return make_app(service, rows, None)


def build(args: dict[str, str]) -> serve.Application:
    """The application, for `serve run` and `serve.run`.

    Args:
        args: `flags`, a line of flags of `kvarena serve`; `min_replicas` and `max_replicas` of engines (1 and 4); what
            a replica takes of a node: `num_cpus` (1), `num_gpus` (0) and `resource`, the name of one of the node's own;
            `ingress_resource` likewise.

    Raises:
        ConfigError: a flag that is unknown, refused, or not honoured here.
    """
    flags = shlex.split(args["flags"])
    if parse_flags(flags).enable_admin:
        raise ConfigError("--enable-admin orders engines of one server, and reaches none of Ray's; leave it out")
    low, high = int(args.get("min_replicas", 1)), int(args.get("max_replicas", 4))
    engines = serve.deployment(EngineReplica).options(
        name="EngineReplica",
        max_ongoing_requests=2048,
        health_check_period_s=1,
        health_check_timeout_s=10,
        graceful_shutdown_timeout_s=30,
        ray_actor_options={
            "num_cpus": float(args.get("num_cpus", 1)),
            "num_gpus": float(args.get("num_gpus", 0)),
            "resources": {args["resource"]: 1} if "resource" in args else {},
        },
        request_router_config=RequestRouterConfig(request_router_class=KVRouter, request_routing_stats_period_s=0.5),
        autoscaling_config=AutoscalingConfig(
            min_replicas=low, max_replicas=high, initial_replicas=low,
            policy=AutoscalingPolicy(policy_function=by_kv_in_use),
        ),
    )  # fmt: skip
    ingress = Ingress.options(
        max_ongoing_requests=8192,
        ray_actor_options={
            "num_cpus": float(args.get("num_cpus", 1)),
            "resources": {args["ingress_resource"]: 1} if "ingress_resource" in args else {},
        },
    )
    return ingress.bind(engines.bind(flags), flags)
