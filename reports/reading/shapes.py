"""What the JSON files that a report reads must look like (docs/files.md), so that a damaged one is one line.

A shape is a description: a name of SCALARS, MOMENT, a list of one shape (a list of such), a dict (an object with these
keys; others are let be), or `Maybe` of a shape: the key may hold null, and be missing unless it is `required`.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

SCALARS: dict[str, tuple[type, ...]] = {
    "text": (str,),
    "number": (int, float),
    "integer": (int,),
    "true or false": (bool,),
    "an object": (dict,),
    "a list": (list,),
}
WORDS = {str: "text", dict: "an object", list: "a list", type(None): "null"}


@dataclass(frozen=True, slots=True)
class Maybe:
    """A key that may hold null."""

    shape: Any
    required: bool = False


MOMENT = object()  # a date and time as of ISO 8601


def mismatch(value: Any, shape: Any, where: str = "") -> str | None:
    """What is wrong with `value` as `shape`, in words that name the place; None when nothing is.

    Args:
        value: parsed JSON.
        shape: see the module.
        where: keys to here, with dots.
    """
    if isinstance(shape, Maybe):
        return None if value is None else mismatch(value, shape.shape, where)
    if isinstance(shape, str):
        if isinstance(value, SCALARS[shape]) and (shape == "true or false" or not isinstance(value, bool)):
            return None
        return f"{where or 'it'} is {_word(value)}, not {shape}"
    if shape is MOMENT:
        return None if _is_moment(value) else f"{where} is {_word(value)}, not a date and time as of ISO 8601"
    if isinstance(shape, list):
        if not isinstance(value, list):
            return f"{where or 'it'} is {_word(value)}, not a list"
        places = ((item, shape[0], f"{where}[{index}]") for index, item in enumerate(value))
    elif not isinstance(value, dict):
        return f"{where or 'it'} is {_word(value)}, not an object"
    else:
        missing = [key for key, inner in shape.items() if key not in value and not _may_be_missing(inner)]
        if missing:
            return f"{where + ' ' if where else 'it '}lacks {', '.join(missing)}"
        places = ((value.get(key), inner, f"{where}.{key}" if where else key) for key, inner in shape.items())
    return next((wrong for place in places if (wrong := mismatch(*place))), None)


def _is_moment(value: Any) -> bool:
    try:
        datetime.fromisoformat(value)
    except (TypeError, ValueError):
        return False
    return True


def _may_be_missing(shape: Any) -> bool:
    return isinstance(shape, Maybe) and not shape.required


def _word(value: Any) -> str:
    return WORDS.get(type(value)) or str(value).lower()


MAYBE_TEXT, MAYBE_NUMBER, MAYBE_INTEGER = Maybe("text"), Maybe("number"), Maybe("integer")
GIT = {"commit": MAYBE_TEXT, "dirty": Maybe("true or false")}
GPU = {"name": "text", "memory_bytes": "number", "count": "integer"}
MACHINE = {"cpu": MAYBE_TEXT, "cores": MAYBE_INTEGER, "memory_bytes": MAYBE_NUMBER, "gpu": Maybe(GPU)}
CONTENTION = {
    "processor_share": MAYBE_NUMBER, "steal_share": MAYBE_NUMBER, "load_average": [MAYBE_NUMBER],
    "gpu_clock_mhz": Maybe({"before": "number", "after": "number"}),
    "probe": Maybe({"before": "number", "after": "number", "spread": MAYBE_NUMBER}),
}  # fmt: skip

TOTALS = {
    **dict.fromkeys(
        ("num_requests", "num_finished", "num_rejected", "num_aborted", "num_failed", "num_prompt_tokens",
         "num_output_tokens", "num_finished_prompt_tokens", "num_finished_output_tokens"), "integer"),
    "duration": "number",
}  # fmt: skip

MANIFEST = {
    "name": "text",
    "created": MAYBE_TEXT,
    "strategy": {"allocator": "text", "scheduler": "text", "details": Maybe("an object")},
    "config": {
        "slo": Maybe({
            **dict.fromkeys(("ttft", "tpot", "e2e"), MAYBE_NUMBER), "attainment": "number", "rule": MAYBE_TEXT,
        }),
        "scheduler": Maybe("an object"),
    },
    "git": GIT,
    "sources": Maybe({"hash": "text", "packages": Maybe("an object"), "strategy": Maybe("an object")}),
    "machine": MACHINE,
    "versions": "an object",
    "model": {
        "name": MAYBE_TEXT, "num_parameters": MAYBE_INTEGER, "kv_bytes_per_token": MAYBE_INTEGER, "dtype": MAYBE_TEXT,
        "kv_needed": Maybe({"num_tokens": "integer", "stored_bytes": "integer", "bytes": "integer", "why": ["text"]}),
    },
    "pool": {"num_slots": MAYBE_INTEGER, "bytes": MAYBE_NUMBER, "block_size": MAYBE_INTEGER},
    "workload": {"name": MAYBE_TEXT, "description": MAYBE_TEXT},
    "arrival": Maybe({"name": MAYBE_TEXT}),
    "cache": MAYBE_TEXT,
    "round": MAYBE_INTEGER,
    "command": Maybe(["text"]),
    "contention": Maybe(CONTENTION),
    "run": {
        "ended": Maybe(MOMENT),
        **dict.fromkeys(("wall_time", "warmup_time", "peak_rss_bytes", "lateness_bound", "processor_seconds"),
                        MAYBE_NUMBER),
        "recorded": MAYBE_TEXT,
        "interrupted": Maybe({
            "by": "text", **dict.fromkeys(("num_requests", "num_submitted", "num_ended"), "integer"),
        }),
        "recording": Maybe({"seconds": "number", "share": "number", "delaying_share": Maybe("number")}),
    },
    "memory": Maybe(dict.fromkeys(
        ("weights_bytes", "pool_bytes", "workspace_bytes", "graphs_bytes", "activations_bytes", "context_bytes",
         "other_bytes", "peak_gpu_bytes"), MAYBE_INTEGER)),
    "simulation": Maybe({
        "kind": "text", "profile": "text", "figures": Maybe("an object"), "source": MAYBE_TEXT, "error": MAYBE_TEXT,
        "outside": Maybe(["text"]),
    }),
    "target": Maybe({
        "url": "text", "model": "text", "extensions_refused": ["text"], "num_other_prompt_lens": "integer",
        "token_counts": Maybe(dict.fromkeys(("not_stated", "other_than_shown", "merged"), "integer")),
        "gauges": Maybe({"url": MAYBE_TEXT, "num_failed": MAYBE_INTEGER, "error": MAYBE_TEXT}),
    }),
}  # fmt: skip

CLAIM = {
    **dict.fromkeys(("quantity", "unit", "tolerance", "verdict", "note"), "text"),
    **dict.fromkeys(("stated", "ours", "low", "high"), Maybe("number", required=True)),
    **dict.fromkeys(("stated_least", "stated_most", "beside", "beside_low", "beside_high"), MAYBE_NUMBER),
    "kind": MAYBE_TEXT,
}
PROFILE = {"name": "text", "source": MAYBE_TEXT, "error": MAYBE_TEXT}
CONDITIONS = {"simulated": "true or false", "profiles": [PROFILE], "seeds": ["integer"]}
SERIES = {"name": "text", "x": "a list", "y": [MAYBE_NUMBER], "low": [MAYBE_NUMBER], "high": [MAYBE_NUMBER]}
CHART = {
    **dict.fromkeys(("name", "kind", "x_label", "y_label", "caption"), "text"),
    "series": [SERIES],
    "log_x": "true or false", "log_y": "true or false", "y_limit": MAYBE_NUMBER, "y_mark": MAYBE_NUMBER,
    "y_mark_name": MAYBE_TEXT,
}  # fmt: skip
STUDY = {
    **dict.fromkeys(("title", "headline", "source", "created"), "text"),
    "experiment": MAYBE_TEXT,
    "claims": [CLAIM],
    "charts": [CHART],
    **{key: ["text"] for key in ("differences", "notes", "command", "cells")},
    "git": GIT,
    "machine": MACHINE,
    "beside": MAYBE_TEXT,
    "versions": Maybe("an object"),
    "conditions": Maybe(CONDITIONS),
}

LEFT_OUT = Maybe([{"name": MAYBE_TEXT, "error": MAYBE_TEXT}])
SWEEP = {
    "runs": ["text"], "baseline": MAYBE_TEXT, "rounds": MAYBE_INTEGER, "command": Maybe(["text"]),
    **dict.fromkeys(("failed", "not_defined", "unserved"), LEFT_OUT),
    "interrupted": Maybe({"by": "text", "left": ["text"]}),
}  # fmt: skip
