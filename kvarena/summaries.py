"""summary.json as typed objects, with the names of its keys. Times in seconds, sizes in bytes, shares in [0, 1].

What a run does not know is None; keys that another version wrote are kept as they are.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict


class _Written(BaseModel):
    """What a report wrote."""

    model_config = ConfigDict(extra="allow", frozen=True, protected_namespaces=())


class Distribution(_Written):
    """Statistics of a quantity over requests, tokens or steps; percentiles interpolate between order statistics."""

    count: int | None = None
    mean: float | None = None
    p50: float | None = None
    p90: float | None = None
    p95: float | None = None
    p99: float | None = None
    min: float | None = None
    max: float | None = None


class KVShares(_Written):
    """Mean share of the pool in each class of the ledger (docs/strategies.md); they add up to 1."""

    token_states: float | None = None
    reservation: float | None = None
    internal: float | None = None
    external: float | None = None
    shortage: float | None = 0.0
    cached: float | None = None
    free: float | None = None


class RunSummary(_Written):
    """summary.json of a run (docs/reports.md)."""

    schema_version: int
    kind: str
    name: str
    headline: str
    notices: list[str]
    valid: bool
    # What ran.
    created: str | None = None
    command: list[str] | None = None
    interrupted: dict[str, Any] | None = None
    strategy: dict[str, Any]
    git: dict[str, Any]
    machine: dict[str, Any]
    versions: dict[str, Any]
    model: dict[str, Any]
    engine: dict[str, Any] | None = None
    pool: dict[str, Any]
    workload: dict[str, Any]
    arrival: dict[str, Any] | None = None
    simulation: dict[str, Any] | None = None
    experts: dict[str, float | None] | None = None
    kv_read: dict[str, float | None] | None = None
    target: dict[str, Any] | None = None
    replicas: int | None = None
    routing: dict[str, Any] | None = None
    imbalance: float | None = None
    cache: str | None = None
    round: int | None = None
    contention: dict[str, Any] | None = None
    # Requests and tokens.
    num_requests: int
    num_finished: int
    num_rejected: int
    num_aborted: int
    num_failed: int
    num_without_first_token: int | None = None
    rejections: list[dict[str, Any]]
    num_prompt_tokens: int
    num_output_tokens: int
    num_finished_prompt_tokens: int
    num_finished_output_tokens: int
    num_preemptions: int | None = None
    num_preempted_requests: int | None = None
    num_recomputed_tokens: int | None = None
    num_cached_tokens: int | None = None
    num_loaded_tokens: int | None = None
    cached_prompt_share: float | None = None
    num_optimal_cached_tokens: int | None = None
    optimal_prompt_share: float | None = None
    cache_share_of_optimum: float | None = None
    prompt_seconds: float | None = None
    prompt_seconds_saved: float | None = None
    cache_by_client: list[dict[str, Any]] | None = None
    reuse: dict[str, Any] | None = None
    # Throughput.
    duration_seconds: float
    wall_time_seconds: float | None = None
    warmup_seconds: float | None = None
    busy_seconds: float | None = None
    busy_share: float | None = None
    output_tokens_per_second: float | None = None
    total_tokens_per_second: float | None = None
    requests_per_second: float | None = None
    processor_seconds: float | None = None
    recorded: str | None = None
    recording: dict[str, Any] | None = None
    peak_rss_bytes: int | None = None
    peak_gpu_bytes: int | None = None
    memory: dict[str, Any] | None = None
    # Latencies.
    ttft_seconds: Distribution
    tpot_seconds: Distribution
    itl_seconds: Distribution
    itl_request_stride: int | None = None
    e2e_seconds: Distribution
    queue_time_seconds: Distribution
    normalized_latency_seconds_per_token: Distribution
    lateness_seconds: Distribution
    lateness_bound_seconds: float | None = None
    steady: dict[str, Any]
    slo: dict[str, Any] | None = None
    # Steps.
    num_steps: int | None = None
    batch_size_mean: float | None = None
    batch_size_max: int | None = None
    num_running_mean: float | None = None
    num_running_max: int | None = None
    queue_mean: float | None = None
    queue_max: int | None = None
    step_seconds: Distribution
    scheduling_seconds: Distribution
    computed_new_tokens: int | None = None
    computed_prefill_tokens: int | None = None
    computed_decode_tokens: int | None = None
    recompute_seconds: float | None = None
    swapped_out_bytes: int | None = None
    swapped_in_bytes: int | None = None
    num_block_copies: int | None = None
    block_copy_seconds: float | None = None
    gauges: dict[str, Any] | None = None
    # KV memory, over all steps, those in which a request waited, and those in which one waited for room.
    kv_pool_slots: int | None = None
    kv_pool_bytes: int | None = None
    kv_peak_owned_slots: int | None = None
    kv_peak_share: dict[str, float | None]
    kv_share_mean: KVShares | None = None
    kv_share_mean_while_waiting: KVShares | None = None
    kv_share_mean_while_waiting_for_room: KVShares | None = None
    waste_beyond_token_states: float | None = None
    waste_beyond_token_states_while_waiting: float | None = None
    waste_beyond_token_states_while_waiting_for_room: float | None = None
    held_share_mean: float | None = None
    held_share_mean_while_waiting: float | None = None
    held_share_mean_while_waiting_for_room: float | None = None
    shared_saved_share_mean: float | None = None
    shared_saved_share_mean_while_waiting: float | None = None
    shared_saved_share_mean_while_waiting_for_room: float | None = None
    num_steps_while_waiting: int | None = None
    num_steps_while_waiting_for_room: int | None = None
    step_time_share: float | None = None
    step_time_share_while_waiting: float | None = None
    step_time_share_while_waiting_for_room: float | None = None


class ComparisonSummary(_Written):
    """summary.json of a comparison (docs/reports.md)."""

    schema_version: int
    kind: str
    headline: str
    notices: list[str]
    baseline: str
    commands: list[list[str]]
    settings: list[str]
    same_tokens: dict[str, Any]
    measured_together: list[str]
    same_runs: Any
    two_clocks: list[str]
    decode_kernels: dict[str, list[str]]
    prefill_kernels: dict[str, list[str]] | None = None  # not in older ones
    cells: list[dict[str, Any]]
    runs: list[dict[str, Any]]
    fastest: dict[str, Any] | None = None
    verdicts: list[dict[str, Any]]
    verdict_rule: dict[str, Any]
    failed: list[dict[str, Any]]
    not_defined: list[dict[str, Any]]
    costs: list[dict[str, Any]]
    same_work: Any
    curves: dict[str, Any] | None = None


class ExperimentSummary(_Written):
    """summary.json of an experiment (docs/experiments.md)."""

    title: str
    experiment: str | None = None
    headline: str
    notices: list[str]
    num_claims: int
    claims: list[dict[str, Any]]
    simulated: bool | None = None
    profiles: list[dict[str, Any]] | None = None
    seeds: list[int] | None = None
    cells: list[str]
    git: dict[str, Any]
    versions: dict[str, Any] | None = None
    command: list[str]
