"""What the JSON files that a report reads must look like (docs/files.md), so that a damaged one is one line.

A shape is a type, as pydantic checks it strictly, a list of one shape (a list of such), or a dict (an object with these
keys; others are let be). A key of `maybe` may hold null, and be missing.
"""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any, NotRequired

from typing_extensions import TypedDict  # pydantic asks for it before Python 3.12

if TYPE_CHECKING:
    from pydantic import TypeAdapter

WORDS = {str: "text", dict: "an object", list: "a list", type(None): "null"}
# By pydantic's name of the error.
EXPECTED = {
    "string_type": "text", "float_type": "number", "int_type": "integer", "bool_type": "true or false",
    "dict_type": "an object", "list_type": "a list", "value_error": "a date and time as of ISO 8601",
}  # fmt: skip

_adapters: dict[int, tuple[TypeAdapter[Any], Any]] = {}  # a sweep's report reads many files of a few shapes


def typed(shape: Any) -> Any:
    """A shape as a type: of an object by its keys, of a list by its one item; types are types already."""
    if isinstance(shape, dict):
        return TypedDict("object", {key: typed(inner) for key, inner in shape.items()})  # type: ignore[operator]
    return list[typed(shape[0])] if isinstance(shape, list) else shape  # type: ignore[misc]


def maybe(shape: Any) -> Any:
    """A key that may hold null, and be missing."""
    return NotRequired[typed(shape) | None]


class _Moment:
    """A text that is a date and time."""

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        from pydantic import AfterValidator

        return AfterValidator(datetime.fromisoformat).__get_pydantic_core_schema__(source, handler)


def mismatch(value: Any, shape: Any, where: str = "") -> str | None:
    """What is wrong with `value` as `shape`, in words that name the place; None when nothing is.

    Args:
        value: parsed JSON.
        shape: see the module.
        where: keys to here, with dots.
    """
    from pydantic import ValidationError  # late: who only starts a process reads no file

    try:
        _adapter(shape).validate_python(value, strict=True)
    except ValidationError as error:
        found = error.errors(include_url=False)
    else:
        return None
    first = next((one for one in found if one["type"] == "missing"), found[0])
    kind, keys, above = first["type"], first["loc"], first["loc"][:-1]
    if kind == "missing":
        lost = [str(one["loc"][-1]) for one in found if one["type"] == kind and one["loc"][:-1] == above]
        return f"{_place(where, above)} lacks {', '.join(lost)}"
    if kind in EXPECTED:
        return f"{_place(where, keys)} is {_word(first['input'])}, not {EXPECTED[kind]}"
    return f"{_place(where, keys)}: {first['msg']}"


def _adapter(shape: Any) -> TypeAdapter[Any]:
    from pydantic import TypeAdapter

    if id(shape) not in _adapters:
        _adapters[id(shape)] = TypeAdapter(typed(shape)), shape  # while it lives, no other one has its id
    return _adapters[id(shape)][0]


def _place(where: str, keys: tuple[int | str, ...]) -> str:
    path = where + "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in keys)
    return path.removeprefix(".") or "it"


def _word(value: Any) -> str:
    return WORDS.get(type(value)) or str(value).lower()[:40]


MOMENT = Annotated[str, _Moment()]
MAYBE_TEXT, MAYBE_NUMBER, MAYBE_INTEGER = maybe(str), maybe(float), maybe(int)
GIT = {"commit": MAYBE_TEXT, "dirty": maybe(bool)}
GPU = {"name": str, "memory_bytes": float, "count": int}
MACHINE = {"cpu": MAYBE_TEXT, "cores": MAYBE_INTEGER, "memory_bytes": MAYBE_NUMBER, "gpu": maybe(GPU)}
CONTENTION = {
    "processor_share": MAYBE_NUMBER, "steal_share": MAYBE_NUMBER, "load_average": list[float | None],
    "gpu_clock_mhz": maybe({"before": float, "after": float}),
    "probe": maybe({"before": float, "after": float, "spread": MAYBE_NUMBER}),
}  # fmt: skip

TOTALS = {
    **dict.fromkeys(
        ("num_requests", "num_finished", "num_rejected", "num_aborted", "num_failed", "num_prompt_tokens",
         "num_output_tokens", "num_finished_prompt_tokens", "num_finished_output_tokens"), int),
    "duration": float,
}  # fmt: skip

MANIFEST = {
    "name": str,
    "created": MAYBE_TEXT,
    "strategy": {
        "allocator": str, "scheduler": str, "details": maybe(dict), "router": MAYBE_TEXT, "routing": maybe(dict),
    },
    "config": {
        "slo": maybe({
            **dict.fromkeys(("ttft", "tpot", "e2e"), MAYBE_NUMBER), "attainment": float, "rule": MAYBE_TEXT,
        }),
        "scheduler": maybe(dict),
    },
    "git": GIT,
    "sources": maybe({"hash": str, "packages": maybe(dict), "strategy": maybe(dict)}),
    "machine": MACHINE,
    "versions": dict,
    "replicas": MAYBE_INTEGER,
    "model": {
        "name": MAYBE_TEXT, "num_parameters": MAYBE_INTEGER, "kv_bytes_per_token": MAYBE_INTEGER, "dtype": MAYBE_TEXT,
        "quantization": MAYBE_TEXT,
        "kv_needed": maybe({"num_tokens": int, "stored_bytes": int, "bytes": int, "why": list[str]}),
    },
    "engine": maybe({"overlap": bool, "step_times": maybe(dict)}),
    "pool": {"num_slots": MAYBE_INTEGER, "bytes": MAYBE_NUMBER, "block_size": MAYBE_INTEGER},
    "workload": {"name": MAYBE_TEXT, "description": MAYBE_TEXT},
    "arrival": maybe({"name": MAYBE_TEXT}),
    "cache": MAYBE_TEXT,
    "round": MAYBE_INTEGER,
    "command": maybe(list[str]),
    "contention": maybe(CONTENTION),
    "run": {
        "ended": maybe(MOMENT),
        **dict.fromkeys(("wall_time", "warmup_time", "peak_rss_bytes", "lateness_bound", "processor_seconds"),
                        MAYBE_NUMBER),
        "recorded": MAYBE_TEXT,
        "interrupted": maybe({
            "by": str, **dict.fromkeys(("num_requests", "num_submitted", "num_ended"), int),
        }),
        "recording": maybe({"seconds": float, "share": float, "delaying_share": maybe(float)}),
    },
    "memory": maybe(dict.fromkeys(
        ("weights_bytes", "pool_bytes", "workspace_bytes", "graphs_bytes", "activations_bytes", "context_bytes",
         "image_cache_bytes", "other_bytes", "peak_gpu_bytes"), MAYBE_INTEGER)),
    "simulation": maybe({
        "kind": str, "profile": str, "figures": maybe(dict), "source": MAYBE_TEXT, "error": MAYBE_TEXT,
        "outside": maybe(list[str]),
    }),
    "target": maybe({
        "url": str, "model": str, "extensions_refused": list[str], "num_other_prompt_lens": int,
        "token_counts": maybe(dict.fromkeys(("not_stated", "other_than_shown", "merged"), int)),
        "gauges": maybe({"url": MAYBE_TEXT, "num_failed": MAYBE_INTEGER, "error": MAYBE_TEXT}),
    }),
}  # fmt: skip

CLAIM = {
    **dict.fromkeys(("quantity", "unit", "tolerance", "verdict", "note"), str),
    **dict.fromkeys(("stated", "ours", "low", "high"), float | None),
    **dict.fromkeys(("stated_least", "stated_most", "beside", "beside_low", "beside_high"), MAYBE_NUMBER),
    "kind": MAYBE_TEXT,
}
PROFILE = {"name": str, "source": MAYBE_TEXT, "error": MAYBE_TEXT}
CONDITIONS = {"simulated": bool, "profiles": [PROFILE], "seeds": list[int]}
SERIES = {"name": str, "x": list, "y": list[float | None], "low": list[float | None], "high": list[float | None]}
CHART = {
    **dict.fromkeys(("name", "kind", "x_label", "y_label", "caption"), str),
    "series": [SERIES],
    "log_x": bool, "log_y": bool, "y_limit": MAYBE_NUMBER, "y_mark": MAYBE_NUMBER,
    "y_mark_name": MAYBE_TEXT,
}  # fmt: skip
STUDY = {
    **dict.fromkeys(("title", "headline", "source", "created"), str),
    "experiment": MAYBE_TEXT,
    "claims": [CLAIM],
    "charts": [CHART],
    **dict.fromkeys(("differences", "notes", "command", "cells"), list[str]),
    "git": GIT,
    "machine": MACHINE,
    "beside": MAYBE_TEXT,
    "versions": maybe(dict),
    "conditions": maybe(CONDITIONS),
}

LEFT_OUT = maybe([{"name": MAYBE_TEXT, "error": MAYBE_TEXT}])
SWEEP = {
    "runs": list[str], "baseline": MAYBE_TEXT, "rounds": MAYBE_INTEGER, "command": maybe(list[str]),
    **dict.fromkeys(("failed", "not_defined", "unserved"), LEFT_OUT),
    "interrupted": maybe({"by": str, "left": list[str]}),
}  # fmt: skip
