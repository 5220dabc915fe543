"""The words and tables of a run's report, made from its summary alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from kvarena.reports.analysis.engines import cache_state, simulated, simulated_machine, target
from kvarena.reports.analysis.gauges import gauges_section
from kvarena.reports.analysis.latency import DEFINITIONS, PERCENTILES
from kvarena.reports.analysis.prefix_cache import from_below, of_optimum, prefix_cache_section
from kvarena.reports.analysis.replicas import replicas_section
from kvarena.reports.analysis.reuse import reuse_tables
from kvarena.reports.analysis.slo import slo_section
from kvarena.reports.analysis.steady import steady_section
from kvarena.reports.analysis.windows import ALL, DEFINITION, ROOM, WINDOWS, kv_use, room_text
from kvarena.reports.drawing.device_memory import device_memory_table
from kvarena.reports.drawing.document import Document, Picture, Section, Table, commands
from kvarena.reports.drawing.format import DASH, count, percent, rate, seconds, size_bytes
from kvarena.reports.drawing.paper import FIGURE_2_SOURCE
from kvarena.reports.drawing.style import CLASS_LOOKS
from kvarena.reports.reading.files import UNRECORDED

ENDS = ("finished", "rejected", "aborted", "failed")
LEDGER_MEANING = {
    "token_states": "slots that hold the KV of computed tokens",
    "reservation": "owned and empty, filled later in the request's residency (from admission on)",
    "internal": "owned, and never filled",
    "external": "free and enough in all for the request at the head of the queue, but no hole is large enough; "
    "buddy remainders",
    "shortage": "free, but less in all (with the cached blocks) than the request at the head of the queue needs",
    "cached": "prefix-cache blocks that no request uses: evictable",
    "free": "the rest",
}


def run_document(summary: dict[str, Any], config: Any, svg: dict[str, str]) -> Document:
    """The report as a document; of a run that recorded nothing its throughput, for that is all there is.

    Args:
        summary: what `summarize` returned.
        config: the resolved configuration.
        svg: name -> inline SVG of every figure.
    """
    recorded = summary["recorded"] != UNRECORDED
    return Document(
        kicker=f"kvarena · report of a {'simulated ' if summary['simulation'] else ''}run",
        title=run_title(summary),
        headline=summary["headline"].replace(" x ", " × "),
        notices=summary["notices"],
        facts=facts(summary),
        commands=commands(summary["command"]),
        tiles=tiles(summary)[: None if recorded else 1],
        sections=[
            memory_section(summary, svg),
            *([gauges_section(summary, svg)] if summary["gauges"] else []),
            latency_section(summary, svg),
            *([slo_section(summary)] if summary["slo"] else []),
            *([replicas_section(summary)] if summary["routing"] else []),
            *([prefix_cache_section(summary, reuse_tables(summary))]
              if summary["num_optimal_cached_tokens"] is not None else []),
            steady_section(summary),
            load_section(summary, svg),
            requests_section(summary, svg),
        ] if recorded else unrecorded_sections(summary),
        definitions=definitions() if recorded else [],
        config=json.dumps(config, indent=2, ensure_ascii=False),
        footer=f"Made by kvarena from manifest.json{', requests.parquet and steps.parquet' * recorded} of the run of "
        f"{summary['created'] or 'unknown date'}, commit {commit(summary)}.",
    )  # fmt: skip


def run_title(summary: dict[str, Any]) -> str:
    """The run's name, and whether it was simulated."""
    return str(summary["name"]).replace(" x ", " × ") + (", simulated" if summary["simulation"] else "")


def _router(summary: dict[str, Any]) -> str:
    """Which, over how many replicas, with its options."""
    options = [pair for pair in _pairs(summary["strategy"].get("routing") or {}) if pair[:13] != "num_replicas="]
    return ", ".join([f"{summary['routing']['router']} over {count(summary['replicas'])} replicas", *options])


def _quantised(model: Mapping[str, Any]) -> str:
    """How the weights were packed, in brackets; empty where they were not."""
    return f" ({model['quantization']})" if model.get("quantization") else ""


def step_loop(engine: Mapping[str, Any]) -> str:
    """Whether the host planned ahead."""
    if engine["overlap"]:
        return "with overlap: a step is planned while the one before runs"
    return "without overlap: a step is planned when the one before has ended"


def facts(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """What ran, on what."""
    strategy, model, pool, machine = (summary[key] or {} for key in ("strategy", "model", "pool", "machine"))
    details = ", ".join(_pairs(strategy.get("details") or {}))
    arrival = dict(summary["arrival"] or {})
    workload = summary["workload"] or {}
    versions = summary["versions"] or {}
    computer = f"{_processor(machine)}, {machine.get('cores', DASH)} cores, {size_bytes(machine.get('memory_bytes'))}"
    return [
        ("Allocator", str(strategy.get("allocator", DASH))),
        ("Scheduler", str(strategy.get("scheduler", DASH))),
        *([("Router", _router(summary))] if summary.get("routing") else []),
        ("Details", details or DASH),
        ("Model", f"{model.get('name', DASH)}, {count(model.get('num_parameters'))} parameters, "
                  f"{model.get('dtype', DASH)}{_quantised(model)}"),
        ("KV pool", f"{_each(summary)}{count(pool.get('num_slots'))} slots, {size_bytes(pool.get('bytes'))}, "
                    f"blocks of {pool.get('block_size', DASH)}{_pages(pool.get('pages'))}"),
        *([("Step loop", step_loop(summary["engine"]))] if summary["engine"] else []),
        ("Workload", f"{workload.get('name', DASH)}, {count(summary['num_requests'])} requests, "
                     f"{_seeds(workload.get('seed'))}"),
        ("Arrivals", ", ".join(str(value) for value in [arrival.pop("name", DASH), *_pairs(arrival)])),
        ("Machine", simulated_machine(summary["simulation"], computer) if summary["simulation"] else computer),
        ("Software", ", ".join(f"{name} {version}" for name, version in versions.items() if version)),
        ("Commit", commit(summary)),
        *([("Simulated", simulated(summary["simulation"]))] if summary["simulation"] else []),
        *([("Target", target(summary["target"]))] if summary["target"] else []),
    ]  # fmt: skip


def _each(summary: dict[str, Any]) -> str:
    number = summary.get("replicas") or 1
    return f"{count(number)} pools, each of " if number > 1 else ""


def _seeds(seed: Any) -> str:
    """Of one run, or of the runs that repeat a cell."""
    return f"seeds {', '.join(map(str, seed))}" if isinstance(seed, list) else f"seed {DASH if seed is None else seed}"


def _pages(pages: dict[str, Any] | None) -> str:
    """Of virtual regions; says so where the pool's size, and not the config, decided."""
    if not pages:
        return ""
    chosen = " (chosen to fit the pool)" if pages.get("page_chosen") else ""
    return f", {count(pages.get('num_pages'))} pages of {count(pages.get('page_tokens'))} tokens{chosen}"


def _pairs(options: dict[str, Any]) -> list[str]:
    return [f"{key}={value}" for key, value in options.items() if value is not None]


def commit(summary: dict[str, Any]) -> str:
    """Short commit, and whether the tree was changed."""
    git = summary["git"] or {}
    if not git.get("commit"):
        return "not a git checkout"
    return str(git["commit"])[:12] + (" with local changes" if git.get("dirty") else "")


def tiles(summary: dict[str, Any]) -> list[tuple[str, str, str]]:
    """The numbers to see first."""
    ttft, tpot, e2e = (summary[f"{name}_seconds"] for name in ("ttft", "tpot", "e2e"))
    return [
        ("Output throughput", f"{rate(summary['output_tokens_per_second'])} tok/s",
         f"{rate(summary['requests_per_second'])} requests/s"),
        ("KV pool in token states", percent(kv_use(summary)), f"{ALL.phrase}; {room_text(summary)}"),
        ("TTFT, median", seconds(ttft["p50"]), f"p99 {seconds(ttft['p99'])}"),
        ("TPOT, median", seconds(tpot["p50"]), f"p99 {seconds(tpot['p99'])}"),
        ("E2E, median", seconds(e2e["p50"]), f"p99 {seconds(e2e['p99'])}"),
        ("Mean batch", rate(summary["batch_size_mean"]), f"largest {count(summary['batch_size_max'])}"),
    ]  # fmt: skip


def memory_section(summary: dict[str, Any], svg: dict[str, str]) -> Section:
    """KV memory: over time, its mean split, and the numbers."""
    if summary["target"]:
        text = (
            f"The engine is another process, {summary['target']['url']}: its steps are not seen from here, so this run "
            "has no ledger. "
            + (
                "What the server says of itself is in the next section."
                if summary["gauges"]
                else "It showed no gauges."
            )
        )
    elif kv_use(summary) is None:
        text = "No step ran."
    else:
        text = _waste_text(summary)
    rows = [
        [CLASS_LOOKS[name].label, *(_share(summary[f"kv_share_mean{window.suffix}"], name) for window in WINDOWS),
         percent(summary["kv_peak_share"][name]), meaning]
        for name, meaning in LEDGER_MEANING.items()
    ]  # fmt: skip
    for key, label, meaning in (
        ("held", "held (owned, in the above)", "owned by finished requests until their static batch ends"),
        ("shared_saved", "saved by sharing", "further slots that requests would own without sharing"),
    ):
        if summary[f"{key}_share_mean"]:
            shares = [percent(summary[f"{key}_share_mean{window.suffix}"]) for window in WINDOWS]
            rows.append([label, *shares, DASH, meaning])
    covered = [percent(summary[f"step_time_share{window.suffix}"]) for window in WINDOWS]
    rows.insert(0, ["of the step time", *covered, DASH, "how much of the run the window covers"])
    table = Table(
        ["share of the pool", *(window.label for window in WINDOWS), "own peak", "meaning"],
        rows,
        text_columns=frozenset({5}),
    )
    pictures = [
        Picture("kv_memory", svg["kv_memory"],
                "KV memory over time: every slot of the pool is in exactly one class in every step. "
                "A gap means that no step ran. Below, the queue.",
                "stacked area of KV slots by ledger class over time"),
        Picture("kv_split", svg["kv_split"],
                f"Mean split of KV memory, weighted by step time, beside {FIGURE_2_SOURCE}. The paper draws what is "
                "neither token state, reservation nor internal fragmentation as one class, “external & others”, and "
                "gives no split of vLLM's last 3.7 % (outlined).",
                "bars of the mean share of each ledger class, with the four bars of the paper"),
    ]  # fmt: skip
    if "kv_map" in svg:
        pictures.append(
            Picture("kv_map", svg["kv_map"],
                    "The KV map: time across, blocks of the pool down, coloured by the request that owns the block; "
                    "pale: owned and empty. What nobody owns has the colour of its class in that step: free, external "
                    "fragmentation or shortage. Requests that never meet may share a colour.",
                    "map of the KV pool over time, coloured by owning request")
        )  # fmt: skip
    tables = [table, device_memory_table(summary)] if summary["peak_gpu_bytes"] else [table]
    return Section("KV memory", [text], pictures, tables)


def _waste_text(summary: dict[str, Any]) -> str:
    """What of the pool held nothing, over all steps and while requests waited for room."""
    text = (
        f"{ALL.phrase.capitalize()}, {percent(summary[f'waste_beyond_token_states{ALL.suffix}'])} of the pool held "
        "neither tokens nor cached prefixes"
    )
    if summary[f"kv_share_mean{ROOM.suffix}"] is None:
        return f"{text}; no request ever waited for room, so that this cost nothing."
    return (
        f"{text}; {ROOM.phrase} ({count(summary[f'num_steps{ROOM.suffix}'])} of {count(summary['num_steps'])} steps, "
        f"{percent(summary[f'step_time_share{ROOM.suffix}'])} of the step time) "
        f"{percent(summary[f'waste_beyond_token_states{ROOM.suffix}'])}."
    )


def _share(split: dict[str, float] | None, name: str) -> str:
    return percent(split[name] if split else None)


def latency_section(summary: dict[str, Any], svg: dict[str, str]) -> Section:
    """Distributions and percentiles."""
    header = ["", "n", "mean", *(f"p{p}" for p in PERCENTILES), "max"]
    rows = []
    for key, (name, _) in DEFINITIONS.items():
        stats = summary[key]
        unit = ", per token" if key.endswith("per_token") else ""
        rows.append([name + unit, count(stats["count"]), *(seconds(stats[column]) for column in header[2:])])
    picture = Picture(
        "latency",
        svg["latency"],
        "Cumulative distributions; circle: median, diamond: 99th percentile. ITL counts gaps, the others requests.",
        "cumulative distributions of TTFT, TPOT, ITL and E2E",
    )
    late = summary["lateness_seconds"]
    note = (
        f"Latencies count from the scheduled arrival. The driver handed requests over {seconds(late['p50'])} late in "
        f"the median, {seconds(late['max'])} at most. Percentiles interpolate linearly between order statistics."
    )
    stride = summary["itl_request_stride"]
    notes = [note] if stride == 1 else [note, f"ITL is that of one request in {stride}: the run has too many tokens."]
    return Section("Latency", [], [picture], [Table(header, rows)], notes)


def _expert_rows(summary: dict[str, Any]) -> list[list[str]]:
    """Of a model with experts: how many a step read, which its floor depends on."""
    if not (experts := summary["experts"]):
        return []
    return [
        ["experts read", rate(experts["read_mean"]),
         f"of {count(experts['num_experts'])} a layer, mean over the time of steps that only decode; a balanced "
         f"routing reads {rate(experts['read_mean_balanced'])} (skew {experts['skew']:.2f})"],
    ]  # fmt: skip


def _kv_rows(summary: dict[str, Any]) -> list[list[str]]:
    """What the attention of decodes read, which is their floor beside the weights."""
    if not (read := summary["kv_read"]):
        return []
    return [
        ["KV read", size_bytes(read["bytes_mean"]),
         "distinct tokens of a step that only decodes, mean over their time; what requests have in common and was read "
         f"once saved {percent(read['saved_share'])} of all reads"],
    ]  # fmt: skip


def load_section(summary: dict[str, Any], svg: dict[str, str]) -> Section:
    """Throughput, batch, queue, preemptions."""
    step, plan = summary["step_seconds"], summary["scheduling_seconds"]
    finished = count(summary["num_finished"])
    rows = [
        *_output_rows(summary),
        ["total tokens/s", rate(summary["total_tokens_per_second"]),
         "prompt and output tokens of finished requests / duration"],
        ["requests/s", rate(summary["requests_per_second"]), f"{finished} finished requests / duration"],
        ["steps", count(summary["num_steps"]), f"median {seconds(step['p50'])}, p99 {seconds(step['p99'])}; "
                                               f"planning takes {seconds(plan['p50'])} in the median"],
        ["busy", percent(summary["busy_share"]), "share of the duration in which a step ran"],
        ["batch size", rate(summary["batch_size_mean"]),
         f"requests in a step's batch, mean over step time; largest {count(summary['batch_size_max'])}"],
        ["queue", rate(summary["queue_mean"]), f"mean over step time; longest {count(summary['queue_max'])}"],
        ["preemptions", count(summary["num_preemptions"]),
         f"of {count(summary['num_preempted_requests'])} request(s); "
         f"{count(summary['num_recomputed_tokens'])} tokens computed again, their part of the step time: "
         f"{seconds(summary['recompute_seconds'])}"],
        ["swapped", size_bytes(summary["swapped_out_bytes"] + summary["swapped_in_bytes"]),
         f"{size_bytes(summary['swapped_out_bytes'])} out, {size_bytes(summary['swapped_in_bytes'])} in; "
         f"all {count(summary['num_block_copies'])} block copies took {seconds(summary['block_copy_seconds'])}"],
        ["prompt tokens from cache", count(summary["num_cached_tokens"]),
         f"{percent(summary['cached_prompt_share'])} of the prompt tokens{of_optimum(summary)}{from_below(summary)}; "
         f"{cache_state(summary)}"],
        *_expert_rows(summary),
        *_kv_rows(summary),
        ["peak host memory", size_bytes(summary["peak_rss_bytes"]),
         f"resident, of the whole process; the KV pool has {size_bytes(summary['kv_pool_bytes'])}"
         + (" on the GPU" if summary["peak_gpu_bytes"] else "")
         + (f", and blocks that are remembered beside it {size_bytes(eviction['bytes'])}"
            if (eviction := summary["pool"].get("eviction")) else "")],
        ["recording", percent((summary["recording"] or {}).get("share")),
         f"{seconds((summary['recording'] or {}).get('seconds'))}, share of "
         + ("the processor time of the simulation" if summary["simulation"] else "wall time")],
    ]  # fmt: skip
    picture = Picture(
        "load",
        svg["load"],
        "Requests in the batch and in the queue, and tokens computed per second of wall time. Recomputed tokens count "
        "again.",
        "batch size, queue length and computed tokens per second over time",
    )
    table = Table(["", "value", "how"], rows, text_columns=frozenset({2}))
    return Section("Throughput and load", [], [picture], [table])


def _output_rows(summary: dict[str, Any]) -> list[list[str]]:
    return [
        ["duration", seconds(summary["duration_seconds"]), "first scheduled arrival to last finish"],
        ["output tokens/s", rate(summary["output_tokens_per_second"]),
         f"{count(summary['num_finished_output_tokens'])} output tokens of finished requests / duration"],
    ]  # fmt: skip


def unrecorded_sections(summary: dict[str, Any]) -> list[Section]:
    """Of a run that recorded nothing: it measures what recording costs the others."""
    rows = [
        *_output_rows(summary)[::-1],
        ["processor time", seconds(summary["processor_seconds"]), "of all threads, while requests ran"],
        ["steps", count(summary["num_steps"]), ""],
        *([f"requests {end}", count(summary[f"num_{end}"]), ""] for end in ENDS),
    ]
    sections = [Section("Throughput", tables=[Table(["", "value", "how"], rows, text_columns=frozenset({2}))])]
    if summary["peak_gpu_bytes"]:
        sections.append(Section("Device memory", tables=[device_memory_table(summary)]))
    return sections


def requests_section(summary: dict[str, Any], svg: dict[str, str]) -> Section:
    """How requests ended, and why some were refused."""
    workload = summary["workload"] or {}
    ended = ", ".join(f"{count(summary[f'num_{end}'])} {end}" for end in ENDS if summary[f"num_{end}"])
    text = [
        f"{count(summary['num_requests'])} requests: {ended or 'none ended'}; "
        f"{count(summary['num_prompt_tokens'])} prompt tokens, {count(summary['num_output_tokens'])} output tokens."
    ]
    if workload.get("description"):
        text.append(f"Workload: {workload['description']}.".replace("..", "."))
    rows = [
        [f"{count(kind['count'])} {kind['finish_reason']}", kind["example"], kind["example_request_id"]]
        for kind in summary["rejections"]
    ]
    tables = [Table(["refused", "why (one example of each kind)", "request"], rows, text_columns=frozenset({1}))]
    picture = Picture(
        "timeline",
        svg["timeline"],
        "The life of requests, by arrival. The files say how often a request was preempted, not when: its longest "
        "waits for a token, one for each preemption, are drawn as such.",
        "Gantt chart of queue, prefill, decode and preemption per request",
    )
    return Section("Requests", text, [picture], tables if rows else [])


def definitions() -> list[tuple[str, str]]:
    """What the words of this report mean."""
    return [
        *DEFINITIONS.values(),
        ("Windows", DEFINITION),
        ("Percentiles", "linear interpolation between order statistics, over requests that finished by themselves"),
        ("Token states", "KV slots that hold computed tokens; a slot that requests share counts once"),
        ("Slot", "the KV of one token in every layer"),
    ]  # fmt: skip


def _processor(machine: dict[str, Any]) -> str:
    """What computed: the GPUs where there are any, else the CPU."""
    gpu = machine.get("gpu")
    if not gpu:
        return str(machine.get("cpu") or DASH)
    return f"{gpu['count']} x {gpu['name']} ({size_bytes(gpu['memory_bytes'])})"
