"""What each column of a run's Parquet files means, and in which unit: written into the files' own metadata.

docs/files.md prints these tables, recorders and reports take names and types from them. A reader finds `unit` and
`meaning` at each column and the version at the schema.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

from kvarena.engine.classes import CLASSES
from kvarena.reports.reading.names import (
    GAUGES_FILE,
    KV_MAP_FILE,
    PREFIXES_FILE,
    REQUESTS_FILE,
    REUSE_FILE,
    ROUTING_FILE,
    SCORES_FILE,
    STEPS_FILE,
)

if TYPE_CHECKING:
    import pyarrow as pa

SCHEMA_VERSION = 1  # files of before have none; columns that were added since are absent in older ones
VERSION_KEY = b"kvarena.schema_version"
FILE_KEY = b"kvarena.file"


class Columns(NamedTuple):
    """Columns of one type, unit and meaning. `unit` is empty where there is none."""

    names: tuple[str, ...]
    kind: str
    unit: str
    meaning: str


def _of(names: str, kind: str, unit: str, meaning: str) -> Columns:
    return Columns(tuple(names.split()), kind, unit, meaning)


TABLES: dict[str, tuple[Columns, ...]] = {
    REQUESTS_FILE: (
        _of("request_id", "string", "", "unique in the run"),
        _of("client_id", "string", "", "whose request it is; empty where nobody asked"),
        _of("kind", "string", "",
            "which kind of request the workload says it is; empty: it says none (since 2026-12-01)"),
        _of("prompt_token_ids output_token_ids", "list of int32", "", "exact token ids"),
        _of("num_prompt_tokens num_output_tokens max_tokens", "int32", "tokens",
            "length of the prompt, of the output, and the most that the output may have"),
        _of("num_first_tokens", "int32", "tokens",
            "output tokens that came together with the first one: of an engine 1, over HTTP those of the first "
            "chunk (since 2026-11-30)"),
        _of("priority", "int32", "", "lower runs first (the priority scheduler)"),
        _of("arrival_time", "double", "s", "the *scheduled* arrival; latencies count from here"),
        _of("submit_time", "double", "s",
            "when the driver handed it to the engine; `submit_time - arrival_time` is the driver's lateness"),
        _of("admission_time", "double, null", "s",
            "end of the wait: start of the first step that computed one of its tokens"),
        _of("first_token_time finish_time", "double, null", "s", "when the first token was on the host; the end"),
        _of("last_token_time", "double, null", "s",
            "when the last output token was there: of an engine `finish_time` (since 2026-11-30)"),
        _of("token_times", "list of double", "s", "when each output token was on the host"),
        _of("finish_reason", "string", "", "`stop`, `length`, `abort`, `rejected`, `error`"),
        _of("num_cached_tokens", "int32", "tokens", "prompt tokens served from the prefix cache at first admission"),
        _of("num_loaded_tokens", "int32", "tokens",
            "of these, those that came up from a level below the pool (since 2026-12-01)"),
        _of("num_optimal_cached_tokens", "double, null", "tokens",
            "prompt tokens that the best prefix cache of this size would have found, given the order of admissions and "
            "what was owned meanwhile (Belady's MIN); null: there is none, or nobody knows (since 2026-11-30)"),
        _of("num_preemptions", "int32", "", "how often it was preempted"),
        _of("num_recomputed_tokens", "int32", "tokens", "computed again because a preemption had dropped them"),
        _of("error", "string", "", "why it was rejected or failed; empty otherwise"),
    ),
    STEPS_FILE: (
        _of("step", "int32", "", "number of the step, from 0"),
        _of("start_time launch_time launched_time end_time", "double", "s",
            "scheduling began; the plan was ready; the runner had launched it (on a CPU: computed it); its tokens"
            " were on the host"),
        _of("num_running num_waiting", "int32", "requests", "requests running and queued during the step"),
        _of("num_scheduled", "int32", "requests", "requests in the step's batch"),
        _of("num_new_tokens", "int32", "tokens", "tokens computed"),
        _of("num_prefill_tokens num_decode_tokens", "int32", "tokens",
            "new tokens of requests that had (not) all but their last token computed"),
        _of("num_sampled", "int32", "tokens", "tokens sampled"),
        _of("num_preempted", "int32", "requests", "requests preempted"),
        _of("num_recomputed_tokens", "int32", "tokens", "of the new tokens, those that a preemption had dropped"),
        _of("num_copies num_swapped_out num_swapped_in", "int32", "blocks",
            "blocks copied; of these, to and from host memory"),
        _of("copy_time", "double", "s",
            "seconds that the step spent on those copies (on a GPU: of the compute stream)"),
        _of("num_prefill_requests", "int32", "requests", "requests of the batch that compute more than one token"),
        _of("longest_prefill", "int32", "tokens",
            "tokens of the longest context among these, the new ones included; 0 without one (since 2026-11-30)"),
        _of("num_kv_tokens", "int64", "tokens", "tokens whose KV attention reads, each once per request of the batch"),
        _of("num_distinct_kv_tokens", "int64", "tokens",
            "of these, those that were read: what decodes have in common is read once where `runner.share_reads` says "
            "so; without it the same number (since 2026-12-01)"),
        _of("num_attention_pairs", "int64", "", "(query, key) pairs of the requests that compute more than one token"),
        _of("num_experts_read", "double", "experts",
            "experts that had a token, and whose weights the step read for it: summed over the layers, without shared "
            "ones; of a simulated run as expected; 0 for a dense model (since 2026-11-30)"),
        _of("decision_hash", "int64", "",
            "digest of what the step decided (`experiments/recording/decisions.py`): equal columns mean equal "
            "decisions"),
        _of(" ".join(CLASSES), "int64", "slots",
            "the ledger; they add up to `total`. Files without `shortage` are older: there it counts as 0"),
        _of("total shared_saved held", "int64", "slots",
            "the pool; slots that sharing saved; owned slots of finished requests that a static batch still holds"),
        _of("replica", "int32", "",
            "which replica ran it; 0 without a router. `step` counts each replica's own steps, and a request's row in "
            "`decision_hash` is its place among those of the replica (since 2026-11-30)"),
    ),
    ROUTING_FILE: (
        _of("replica", "int32", "", "from 0: where the request of the same row of requests.parquet was sent"),
        _of("time", "double", "s", "when"),
    ),
    SCORES_FILE: (
        _of("request_id", "string", "", "as in requests.parquet"),
        _of("num_candidates", "int32", "", "K"),
        _of("token_ids", "list of int32", "", "`num_output_tokens` x K"),
        _of("values", "list of double", "",
            "their scores: the logit, or with sampling logit / temperature - log E of the draw; after bars, bias "
            "and penalties, -inf for what top-k, top-p or min-p dropped; no maximum taken off, not normalised"),
    ),
    KV_MAP_FILE: (
        _of("step", "int32", "", "the step that the snapshot belongs to"),
        _of("time", "double", "s", "its `start_time`"),
        _of("owner", "list of int32", "",
            "for each block: row of the owning request in requests.parquet; -1 free, of the class that the ledger"
            " gives all free slots of the step (`free`, `external` or `shortage`), -2 cached, -3 shared by "
            "several requests, -4 external: what the region before it is rounded up by (buddy placement)"),
        _of("filled", "list of int16", "slots", "its slots that hold computed tokens"),
        _of("stride", "int64", "blocks",
            "entry i of the lists stands for block 1 + i * `stride`; above 1 in pools of more than 4,096 blocks"),
        _of("owned_blocks filled_slots cached_blocks", "int64", "",
            "blocks, slots and blocks, counted over all blocks of the step's block tables, whatever the stride; "
            "absent in files of before"),
    ),
    REUSE_FILE: (
        _of("request", "int32", "", "the row in requests.parquet of the request that asked, at its first admission"),
        _of("start num_tokens", "int64", "tokens",
            "a stretch of its prompt, in whole blocks, that was last held up to the same moment"),
        _of("num_cached_tokens num_optimal_cached_tokens", "int64", "tokens",
            "of these, how many were found, and how many the best prefix cache finds (as in requests.parquet)"),
        _of("seconds", "double, null", "s", "since a request held them last; 0: one does; null: none ever did"),
        _of("num_since", "int64, null", "blocks",
            "different blocks that were held since then, for the first block of the stretch; for each further one "
            "one more. null: a request holds them, or none ever did"),
    ),
    PREFIXES_FILE: (
        _of("request_id", "string", "", "as in requests.parquet"),
        _of("block_size", "int32", "tokens", "positions of a block"),
        _of("block_hashes", "list of int64", "",
            "of prompt and output together, a hash for each block and all before it, the last one perhaps partial: "
            "equal hashes mean equal beginnings, and tell nothing of the content"),
    ),
    GAUGES_FILE: (
        _of("time", "double", "s", "since the start of the run"),
        _of("num_running num_waiting", "double", "requests", "requests running and queued"),
        _of("kv_usage", "double", "", "share of the KV pool in use, in [0, 1]"),
        _of("num_preemptions", "double", "", "counted since the server started"),
        _of("prefix_queries prefix_hits", "double", "tokens",
            "looked up in the prefix cache and found, counted since the server started"),
        _of(" ".join(CLASSES), "double", "slots",
            "of a kvarena server, by the ledger's classes"),
    ),
}  # fmt: skip


def types_of(file: str) -> dict[str, str]:
    """The columns of a file and their types, in order."""
    return {name: columns.kind.removesuffix(", null") for columns in TABLES[file] for name in columns.names}


def names_of(file: str, without: Iterable[str] = ()) -> tuple[str, ...]:
    """The columns of a file but for some, in order."""
    left_out = frozenset(without)
    return tuple(name for name in types_of(file) if name not in left_out)


def schema_of(file: str) -> pa.Schema:
    """A file's columns as Arrow has them, each with its unit and meaning, and the schema's version."""
    import pyarrow as pa

    fields = []
    for columns in TABLES[file]:
        metadata = {"meaning": columns.meaning} | ({"unit": columns.unit} if columns.unit else {})
        kind = _arrow_type(columns.kind.removesuffix(", null"))
        fields += [pa.field(name, kind, metadata=metadata) for name in columns.names]
    return pa.schema(fields, {VERSION_KEY: str(SCHEMA_VERSION), FILE_KEY: file})


def _arrow_type(kind: str) -> pa.DataType:
    import pyarrow as pa

    if kind.startswith("list of "):
        return pa.list_(_arrow_type(kind.removeprefix("list of ")))
    return pa.float64() if kind == "double" else pa.type_for_alias(kind)
