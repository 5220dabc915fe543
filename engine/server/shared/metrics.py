"""Metrics in shared memory.

A page holds rows of doubles: one for each engine, then of each front one for each engine. Each row has one writer, so
there are no locks; an aligned 8-byte store is atomic on the machines that we run on. What adds up, such as the classes
of slots, is written by one copy and read by one. `/metrics` adds an engine's up.

    engine 0 | engine 1 | front 0: of engine 0, of engine 1 | front 1: of engine 0, of engine 1

What a front counts of no engine in particular (HTTP, what it refused itself) is in its row of engine 0.
Names, types, labels and buckets are vLLM's, so that its boards and autoscalers work; ours beside them start with
`kvarena:`. The engine's heart-beat lives here too, so that `/health` needs no answer from the engine.
"""

from __future__ import annotations

import bisect
import time
from array import array
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from typing import Any, NamedTuple

from kvarena.engine.classes import CLASSES
from kvarena.engine.server.shared.page import Page
from kvarena.engine.usage import LEVEL_CLASSES

LATENCY = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
TTFT = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560,
)  # fmt: skip
ITL = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
TOKENS = tuple(m * 10**e for e in range(7) for m in (1, 2, 5))
NUM_CHOICES = (1, 2, 5, 10, 20)
PREEMPTIONS = (1, 2, 3, 4, 5, 10, 20)
HTTP_SECONDS = (0.1, 0.5, 1)

FINISH_REASONS = ("stop", "length", "abort", "error", "repetition")
HANDLERS = (
    "/v1/chat/completions", "/v1/completions", "/v1/models", "/v1/models/{model_id}", "/tokenize", "/detokenize",
    "/v1/responses", "/v1/responses/{response_id}", "/v1/responses/{response_id}/cancel",
    "/v1/responses/{response_id}/input_items", "/v1/messages", "/v1/messages/count_tokens",
    "/tokenizer_info", "/server_info", "/invocations",
    "/reset_prefix_cache", "/pause", "/resume", "/is_paused", "/abort_requests",
    "/", "/docs", "/openapi.json", "/dashboard", "/dashboard/events", "/static/{name}", "none",
)  # fmt: skip
METHODS = ("GET", "POST", "other")
STATUSES = ("2xx", "3xx", "4xx", "5xx")

LOADING, READY, DRAINING, FAILED = range(4)
PAUSED = "kvarena:engine_paused"


class Metric(NamedTuple):
    """One metric: kind is gauge, counter, histogram or internal (not exported)."""

    name: str
    kind: str
    help: str
    labels: Mapping[str, Sequence[str]] = {}
    buckets: tuple[float, ...] = ()

    @property
    def width(self) -> int:
        """Doubles per label combination: a histogram has its buckets, +Inf and the sum."""
        return len(self.buckets) + 2 if self.kind == "histogram" else 1


_REQUEST_SECONDS = {
    "time_to_first_token_seconds": ("Time from arrival to the first token.", TTFT),
    "inter_token_latency_seconds": ("Time between tokens of one request.", ITL),
    "request_time_per_output_token_seconds": ("Mean time per output token of a request.", ITL),
    "e2e_request_latency_seconds": ("Time from arrival to the last token.", LATENCY),
    "request_queue_time_seconds": ("Time in the queue.", LATENCY),
    "request_inference_time_seconds": ("Time from the first step to the last token.", LATENCY),
    "request_prefill_time_seconds": ("Time from the first step to the first token.", LATENCY),
    "request_decode_time_seconds": ("Time from the first to the last token.", LATENCY),
}
_REQUEST_COUNTS = {
    "request_prompt_tokens": ("Prompt tokens of a request.", TOKENS),
    "request_generation_tokens": ("Output tokens of a request.", TOKENS),
    "request_max_num_generation_tokens": ("Most output tokens over a request's choices.", TOKENS),
    "request_params_n": ("Parameter n of requests.", NUM_CHOICES),
    "request_params_max_tokens": ("Parameter max_tokens of requests.", TOKENS),
    "request_num_preemptions": ("Preemptions of a request.", PREEMPTIONS),
    "request_prefill_kv_computed_tokens": ("Prompt tokens computed, cached ones left out.", TOKENS),
    "iteration_tokens_total": ("Prompt tokens computed and tokens generated in one engine step.", STEP_TOKENS),
}

METRICS: tuple[Metric, ...] = (
    Metric("heartbeat", "internal", "Monotonic time of the last sign of life."),
    Metric("progress", "internal", "Monotonic time of the last finished step, or of new work on an idle engine."),
    Metric("has_work", "internal", "1 while requests are in the engine."),
    Metric("state", "internal", "LOADING, READY, DRAINING or FAILED."),
    Metric("num_sent", "internal", "Prompts that a front has sent to an engine."),
    Metric("num_open", "internal", "Prompts of these that have not ended."),
    Metric("queued_tokens", "internal", "Prompt tokens of these that no step has begun."),
    Metric("tokens_to_compute", "internal", "Prompt tokens of those whose first token has not come."),
    Metric("vllm:num_requests_running", "gauge", "Requests in the running batch."),
    Metric("vllm:num_requests_waiting", "gauge", "Requests waiting in the queue."),
    Metric(
        "vllm:num_requests_waiting_by_reason",
        "gauge",
        "Requests waiting in the queue, by reason.",
        {"reason": ("capacity", "deferred")},
    ),
    Metric("vllm:kv_cache_usage_perc", "gauge", "Share of the KV pool that requests own; 1 is full."),
    Metric(
        "vllm:engine_sleep_state",
        "gauge",
        "Sleep state.",
        {"sleep_state": ("awake", "weights_offloaded", "discard_all")},
    ),
    Metric("vllm:num_preemptions", "counter", "Preemptions."),
    Metric("vllm:prompt_tokens", "counter", "Prompt tokens taken in."),
    Metric("vllm:generation_tokens", "counter", "Tokens generated."),
    Metric(
        "vllm:prompt_tokens_by_source",
        "counter",
        "Prompt tokens, by where their KV came from.",
        {"source": ("local_compute", "local_cache_hit", "external_kv_transfer")},
    ),
    Metric("vllm:prompt_tokens_cached", "counter", "Prompt tokens served from the prefix cache."),
    Metric("vllm:prefix_cache_queries", "counter", "Prompt tokens looked up in the prefix cache."),
    Metric("vllm:prefix_cache_hits", "counter", "Prompt tokens found in the prefix cache."),
    Metric("vllm:external_prefix_cache_queries", "counter", "Prompt tokens looked up in the levels below the pool."),
    Metric("vllm:external_prefix_cache_hits", "counter", "Prompt tokens that came up from there."),
    Metric(
        "vllm:kv_offload_total_bytes",
        "counter",
        "Bytes of keys and values that went to host memory, and came from it.",
        {"transfer_type": ("GPU_to_CPU", "CPU_to_GPU")},
    ),
    Metric("vllm:request_success", "counter", "Requests that ended.", {"finished_reason": FINISH_REASONS}),
    Metric(
        "vllm:admission_rejections",
        "counter",
        "Requests refused on arrival.",
        {
            "reason": (
                "queue_full",
                "key_limit",
                "max_model_len",
                "max_request_tokens",
                "draining",
                "paused",
                "engine_dead",
            )
        },
    ),
    *(Metric(f"vllm:{n}", "histogram", h, {}, b) for n, (h, b) in (_REQUEST_SECONDS | _REQUEST_COUNTS).items()),
    Metric("kvarena:kv_slots", "gauge", "Slots of the KV pool; the classes add up to it.", {"class": CLASSES}),
    Metric("kvarena:kv_slots_shared_saved", "gauge", "Slots that sharing saves."),
    Metric(
        "kvarena:kv_level_blocks",
        "gauge",
        "Blocks of the levels below the KV pool; the classes add up to a level.",
        {"level": ("host",), "class": LEVEL_CLASSES},
    ),
    Metric("kvarena:ledger_violations", "counter", "Steps whose slots did not add up, and slots that leaked."),
    Metric("kvarena:recording_up", "gauge", "1 while what is served is recorded."),
    Metric("kvarena:image_cache_hits", "counter", "Tiles of images that a step needed and found encoded."),
    Metric("kvarena:image_cache_misses", "counter", "Tiles of images that a step had to encode."),
    Metric("kvarena:image_cache_used_bytes", "gauge", "Bytes of the encoder cache that hold something."),
    Metric("kvarena:image_cache_size_bytes", "gauge", "Bytes of the encoder cache; 0 for a model of text."),
    Metric("kvarena:engine_up", "gauge", "1 while the engine takes requests."),
    Metric(PAUSED, "gauge", "0; 1 while requests wait for /resume; 2 while they are refused until then."),
    Metric("kvarena:engine_restarts", "counter", "Engines that were started in place of one that ended or froze."),
    Metric("kvarena:rerouted_requests", "counter", "Prompts that lost this engine and were given to another one."),
    Metric("kvarena:steps", "counter", "Engine steps."),
    Metric("kvarena:failed_steps", "counter", "Engine steps that failed; their requests ended with an error."),
    Metric("kvarena:slow_reader_aborts", "counter", "Requests ended because their client did not read."),
    Metric("kvarena:open_requests", "gauge", "HTTP requests being served."),
    Metric(
        "http_requests",
        "counter",
        "HTTP requests.",
        {"handler": HANDLERS, "method": METHODS, "status": STATUSES},
    ),
    Metric(
        "http_request_duration_seconds",
        "histogram",
        "HTTP latency.",
        {"handler": HANDLERS, "method": METHODS},
        HTTP_SECONDS,
    ),
)


def _layout() -> tuple[dict[tuple[str, ...], int], int]:
    """Offsets of (name, *label values) in a row, and the row's length."""
    offsets: dict[tuple[str, ...], int] = {}
    size = 0
    for metric in METRICS:
        for values in product(*metric.labels.values()):
            offsets[(metric.name, *values)] = size
            size += metric.width
    return offsets, size


_OFFSETS, _ROW_DOUBLES = _layout()
_HELD = [_OFFSETS[metric.name, *values] for metric in METRICS if metric.kind in ("gauge", "internal")
         for values in product(*metric.labels.values())]  # fmt: skip
_BUCKETS = {metric.name: metric.buckets for metric in METRICS if metric.kind == "histogram"}
_FIRST_LABELS = {metric.name: tuple(values[0] for values in metric.labels.values()) for metric in METRICS}


def offset_of(name: str, *labels: str) -> int:
    """Where a metric stands in a row."""
    return _OFFSETS[(name, *labels)]


def create_page(num_fronts: int, num_engines: int = 1) -> Page:
    """Make the shared page."""
    return Page.of_size(num_engines * (1 + num_fronts) * _ROW_DOUBLES * 8)


class Row:
    """One row of metrics.

    Args:
        page: what `create_page` made.
        index: of the row; see `Rows`.
    """

    def __init__(self, page: Page, index: int) -> None:
        self._map = page.map()
        doubles = memoryview(self._map).cast("d")
        self.values = doubles[index * _ROW_DOUBLES : (index + 1) * _ROW_DOUBLES]

    def inc(self, name: str, *labels: str, by: float = 1.0) -> None:
        """Add to a counter or gauge."""
        self.values[_OFFSETS[(name, *labels)]] += by

    def set(self, name: str, value: float, *labels: str) -> None:
        """Set a gauge."""
        self.values[_OFFSETS[(name, *labels)]] = value

    def set_all(self, name: str, values: Iterable[float]) -> None:
        """Set a gauge for all of its labels' values, in their order, by one copy: a reader never sees some of them."""
        block = array("d", values)
        at = _OFFSETS[(name, *_FIRST_LABELS[name])]
        self.values[at : at + len(block)] = memoryview(block)

    def copied(self) -> Sequence[float]:
        """The values as they stand now, by one copy."""
        return memoryview(bytes(self.values)).cast("d")

    def get(self, name: str, *labels: str) -> float:
        """Read a counter or gauge."""
        return self.values[_OFFSETS[(name, *labels)]]

    def forget(self) -> None:
        """Set what tells of now to 0: whoever wrote it is gone. What was counted stays."""
        for at in _HELD:
            self.values[at] = 0.0

    def observe(self, name: str, value: float, *labels: str) -> None:
        """Count `value` in a histogram."""
        buckets = _BUCKETS[name]
        at = _OFFSETS[(name, *labels)]
        self.values[at + bisect.bisect_left(buckets, value)] += 1
        self.values[at + len(buckets) + 1] += value


class Rows:
    """All rows of a server.

    Args:
        page: what `create_page` made.
        num_fronts, num_engines: as it was made for.

    Attributes:
        engines: each engine's row.
        fronts: of each front its rows, one for each engine.
    """

    def __init__(self, page: Page, num_fronts: int, num_engines: int = 1) -> None:
        rows = [Row(page, index) for index in range(num_engines * (1 + num_fronts))]
        groups = [rows[start : start + num_engines] for start in range(0, len(rows), num_engines)]
        self.engines, self.fronts = groups[0], groups[1:]

    def of_engine(self, engine: int) -> list[Row]:
        """What was counted of one engine: its own row first, then one of each front."""
        return [self.engines[engine], *(front[engine] for front in self.fronts)]


class Histogram:
    """A histogram of one row with its offset looked up: for values observed per token."""

    def __init__(self, row: Row, name: str) -> None:
        self._values, self._buckets, self._at = row.values, _BUCKETS[name], _OFFSETS[(name,)]
        self._sum_at = self._at + len(self._buckets) + 1

    def observe(self, value: float) -> None:
        """Count `value`."""
        self._values[self._at + bisect.bisect_left(self._buckets, value)] += 1
        self._values[self._sum_at] += value


def total(rows: Sequence[Row], name: str, *labels: str) -> float:
    """A counter or gauge over all processes."""
    return sum(row.get(name, *labels) for row in rows)


def family_total(rows: Sequence[Row], name: str, **labels: str) -> float:
    """A counter over all processes and all of its label values but those given."""
    metric = next(metric for metric in METRICS if metric.name == name)
    values = [(labels[key],) if key in labels else known for key, known in metric.labels.items()]
    return sum(total(rows, name, *one) for one in product(*values))


def histogram(rows: Sequence[Row], name: str) -> dict[str, Any]:
    """A histogram without labels over all processes: `bounds`, how many values are at most each (`counts`, not
    cumulative, the last one beyond all bounds), and their `sum`.
    """
    bounds, at = _BUCKETS[name], _OFFSETS[(name,)]
    counts = [sum(row.values[at + i] for row in rows) for i in range(len(bounds) + 1)]
    return {"bounds": bounds, "counts": counts, "sum": sum(row.values[at + len(bounds) + 1] for row in rows)}


class Health(NamedTuple):
    """The engine's state as the page tells it. `reason` is empty when all is well."""

    alive: bool
    reason: str


def health(row: Row, heartbeat_timeout: float, stall_timeout: float) -> Health:
    """Judge the engine by its row.

    Args:
        row: the engine's row.
        heartbeat_timeout: seconds of silence after which the process counts as dead or frozen.
        stall_timeout: seconds without a finished step while work is queued.
    """
    now = time.monotonic()
    state = int(row.get("state"))
    if state == LOADING:
        return Health(True, "the engine is loading")
    if state == FAILED:
        return Health(False, "the engine has failed")
    silent = now - row.get("heartbeat")
    if silent > heartbeat_timeout:
        return Health(False, f"the engine process has been silent for {silent:.1f} s")
    stalled = now - row.get("progress")
    if row.get("has_work") and stalled > stall_timeout:
        return Health(True, f"the engine has finished no step for {stalled:.1f} s while work is queued")
    return Health(True, "")
