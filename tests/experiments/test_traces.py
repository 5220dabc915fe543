"""Trace loaders: the statistics of the real files, exact times, shared prefixes, and what the options do."""

import gzip
import itertools
import json
import time
from pathlib import Path

import numpy as np
import pytest

from kvarena.engine.errors import ConfigError, TraceError
from kvarena.experiments.workloads.azure import AzureTraceWorkload, parse_time
from kvarena.experiments.workloads.burstgpt import BurstGPTWorkload
from kvarena.experiments.workloads.mooncake import MooncakeWorkload
from kvarena.experiments.workloads.vidur import VidurWorkload

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"
COMMON = {"seed": 0, "vocab_size": 1000}
AZURE = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\r\n"
    "2023-11-16 18:17:03.9799600,4808,10\r\n"
    "2023-11-16 18:17:04.0319601,3180,8\r\n"
    "2023-11-16 18:17:04.0319601,110,27\r\n"
    "2023-11-16 23:59:59.9999999,7,1"
)


def write(tmp_path, text, name="trace.csv"):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def real(name):
    if not (DATA / name).is_file():
        pytest.skip(f"the real trace {name} is not on this machine ({DATA})")
    return str(DATA / name)


def facts(lens):
    return [lens.mean(), *np.quantile(lens, [0.5, 0.9, 0.99]), lens.max()]


@pytest.mark.parametrize(
    ("name", "num", "context", "generated", "span", "rate", "cv"),
    [
        ("code", 8819, (2047.8, 1469, 5194, 7436, 7437), (27.9, 13, 55, 252, 1899), 3436, 2.57, 13.15),
        ("conv", 19366, (1154.7, 1020, 2735, 4142, 14050), (211.1, 129, 424, 601, 1000), 3502, 5.53, 1.09),
    ],
)
def test_real_azure_statistics(name, num, context, generated, span, rate, cv):
    path = real(f"AzureLLMInferenceTrace_{name}.csv")
    start = time.process_time()
    table = AzureTraceWorkload(path=path, **COMMON).table
    assert time.process_time() - start < 1.0
    assert len(table) == num
    assert facts(table.prompt_lens) == pytest.approx(context, rel=3e-3)
    assert facts(table.output_lens) == pytest.approx(generated, rel=3e-3)
    gaps = np.diff(table.arrival_times)
    assert table.arrival_times[0] == 0
    assert table.arrival_times[-1] == pytest.approx(span, abs=0.5)
    assert num / table.arrival_times[-1] == pytest.approx(rate, abs=0.005)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, abs=0.005)


@pytest.mark.parametrize(
    ("name", "num", "mean_in", "mean_out", "hit_rate"),
    [("conversation", 12031, 12035, 343, 0.366), ("synthetic", 3993, 15325, 149, 0.640)],
)
def test_real_mooncake_statistics(name, num, mean_in, mean_out, hit_rate):
    workload = MooncakeWorkload(path=real(f"mooncake_{name}_trace.jsonl"), **COMMON)
    table = workload.table
    assert len(table) == num
    assert table.prompt_lens.mean() == pytest.approx(mean_in, abs=0.6)
    assert table.output_lens.mean() == pytest.approx(mean_out, abs=0.6)
    hits, blocks = workload.block_hits()
    assert hits / blocks == pytest.approx(hit_rate, abs=5e-4)
    if name == "conversation":
        stamps, counts = np.unique(table.arrival_times, return_counts=True)
        assert (len(stamps), counts.max()) == (1180, 28)


def test_azure_times_are_exact_to_100_ns(tmp_path):
    items = AzureTraceWorkload(path=write(tmp_path, AZURE), **COMMON).items()
    assert [item.arrival_time for item in items] == [0.0, 0.0520001, 0.0520001, 20576.0200399]
    assert [(len(i.prompt_token_ids), i.output_len) for i in items] == [(4808, 10), (3180, 8), (110, 27), (7, 1)]


@pytest.mark.parametrize("change", [("\r\n", "\n"), ("7,1", "7,1\r\n"), ("TIMESTAMP", "\ufeffTIMESTAMP")])
def test_azure_line_ends_and_byte_order_mark(tmp_path, change):
    changed = AzureTraceWorkload(path=write(tmp_path, AZURE.replace(*change)), **COMMON)
    assert changed.items() == AzureTraceWorkload(path=write(tmp_path, AZURE, "b.csv"), **COMMON).items()


def test_azure_gzip_and_multimodal_columns(tmp_path):
    text = (
        "TIMESTAMP,NumImages,ContextTokens,GeneratedTokens\n2024-10-15 00:00:00.5,0,10,2\n2024-10-15 00:00:01,3,10,2\n"
    )
    path = write(tmp_path, gzip.compress(text.encode()), "trace.csv.gz")
    assert AzureTraceWorkload(path=path, **COMMON).table.prompt_lens.tolist() == [10, 10]
    with_images = AzureTraceWorkload(path=path, tokens_per_image=256, **COMMON).table
    assert with_images.prompt_lens.tolist() == [10, 778]
    assert with_images.arrival_times.tolist() == [0, 0.5]


def test_time_stamps():
    base = parse_time("2024-05-10 00:00:00")
    assert parse_time("2024-05-10 00:00:00.009930+00:00") - base == 9_930_000
    assert parse_time("2024-05-10 02:00:00.1+02:00") - base == 100_000_000
    assert parse_time("2024-05-09T23:30:00-00:30") == base
    assert parse_time("2024-03-01 00:00:00Z") - parse_time("2024-02-29 23:59:59.999999999") == 1
    for wrong in ("", "2023-11-16", "2023-02-29 00:00:00", "2023-11-16 24:00:00", "2023-11-16 00:00:60", "1699990000"):
        assert parse_time(wrong) is None
    for wrong in (
        "2023-11-16 18:17:03.",
        "2023-11-16 18:17:03.0123456789",
        "2023-11-16 18:17:03 ",
        "٢023-11-16 18:17:03",
    ):
        assert parse_time(wrong) is None


def test_first_rows_skip_and_repeat(tmp_path):
    path = write(tmp_path, AZURE)
    whole = AzureTraceWorkload(path=path, **COMMON).items()
    assert AzureTraceWorkload(path=path, num_requests=2, **COMMON).items() == whole[:2]
    skipped = AzureTraceWorkload(path=path, skip=1, num_requests=2, **COMMON).items()
    assert [item.output_len for item in skipped] == [8, 27]
    assert skipped[0].arrival_time == 0
    with pytest.raises(ConfigError, match=r"num_requests=6, but .* gives 4 requests"):
        AzureTraceWorkload(path=path, num_requests=6, **COMMON).items()
    workload = AzureTraceWorkload(path=path, num_requests=10, repeat=True, **COMMON)
    items = workload.items()
    assert [item.output_len for item in items] == [10, 8, 27, 1, 10, 8, 27, 1, 10, 8]
    times = [item.arrival_time for item in items]
    period = whole[-1].arrival_time * 4 / 3
    assert times[4:8] == pytest.approx([t.arrival_time + period for t in whole])
    assert times == sorted(times)
    assert len({tuple(item.prompt_token_ids) for item in items}) == 10
    assert "2.5 passes over 4 rows" in workload.description


def test_rows_that_go_back_in_time_are_sorted_and_counted(tmp_path):
    lines = AZURE.split("\r\n")
    text = "\n".join([lines[0], lines[4], lines[1], lines[2], lines[3]])
    workload = AzureTraceWorkload(path=write(tmp_path, text), **COMMON)
    assert workload.items() == AzureTraceWorkload(path=write(tmp_path, AZURE, "b.csv"), **COMMON).items()
    assert "sorted 3 rows whose time went back" in workload.description


def test_limits_are_counted(tmp_path):
    path = write(tmp_path, AZURE)
    dropped = AzureTraceWorkload(path=path, max_total_len=3188, num_requests=3, **COMMON)
    assert dropped.table.prompt_lens.tolist() == [3180, 110, 7]
    assert "dropped 1 of 4 (max_total_len 3188)" in dropped.description
    clipped = AzureTraceWorkload(path=path, max_total_len=120, on_exceed="clip", **COMMON)
    assert clipped.table.prompt_lens.tolist() == [119, 119, 110, 7]
    assert clipped.table.output_lens.tolist() == [1, 1, 10, 1]
    assert "clipped 3 of 4" in clipped.description
    with pytest.raises(TraceError, match="no row is left of the 4 read"):
        AzureTraceWorkload(path=path, max_total_len=3, **COMMON).items()


def test_zero_lengths_can_be_dropped(tmp_path):
    workload = AzureTraceWorkload(path=write(tmp_path, AZURE.replace(",8", ",0")), drop_zero=True, **COMMON)
    assert workload.table.output_lens.tolist() == [10, 27, 1]
    assert "dropped 1 rows with a length of 0" in workload.description


def mooncake_line(stamp, length, ids, output=5):
    return json.dumps({"timestamp": stamp, "input_length": length, "output_length": output, "hash_ids": ids})


def mooncake(tmp_path, lines, **options):
    return MooncakeWorkload(path=write(tmp_path, "\n".join(lines), "m.jsonl"), **(COMMON | options))


def test_equal_hash_ids_give_equal_blocks_at_any_block_size(tmp_path):
    lines = [
        mooncake_line(0, 1500, [7, 8, 9]),
        mooncake_line(0, 1324, [7, 8, 9]),  # the same last block, shorter
        mooncake_line(10, 1536, [7, 8, 10]),
        mooncake_line(3000, 512, [8]),
        mooncake_line(3000, 1, [11]),
    ]
    items = mooncake(tmp_path, lines).items()
    a, b, c, d, e = (item.prompt_token_ids for item in items)
    assert [len(p) for p in (a, b, c, d, e)] == [1500, 1324, 1536, 512, 1]
    assert a[:1324] == b
    assert a[:1024] == c[:1024]
    assert a[512:1024] == d
    assert a[1024:1040] != c[1024:1040]
    assert a[:16] != d[:16]
    assert [item.arrival_time for item in items] == [0, 0, 0.01, 3, 3]
    # Shared full blocks, counted as an engine with another block size would: 1024 tokens of [7, 8] in common.
    for size in (16, 48, 100):
        blocks = [tuple(p[: (i + 1) * size]) for p in (a, c) for i in range(len(p) // size)]
        assert len(blocks) - len(set(blocks)) == 1024 // size


def test_mooncake_seed_changes_content_and_passes_do_not_share(tmp_path):
    lines = [mooncake_line(0, 600, [1, 2]), mooncake_line(2000, 600, [1, 3])]
    first = mooncake(tmp_path, lines).items()
    assert mooncake(tmp_path, lines, seed=1).items()[0].prompt_token_ids != first[0].prompt_token_ids
    items = mooncake(tmp_path, lines, num_requests=4, repeat=True).items()
    assert items[:2] == first
    assert items[2].prompt_token_ids[:20] != first[0].prompt_token_ids[:20]
    assert items[2].prompt_token_ids[:512] == items[3].prompt_token_ids[:512]


def test_mooncake_other_hash_block_size(tmp_path):
    items = mooncake(tmp_path, [mooncake_line(0, 40, [1, 2, 3])], hash_block_size=16).items()
    assert len(items[0].prompt_token_ids) == 40
    with pytest.raises(TraceError, match="3 ids for 40 tokens; 1 are needed"):
        mooncake(tmp_path, [mooncake_line(0, 40, [1, 2, 3])]).items()


def test_spread_bins_turns_bursts_into_a_flow(tmp_path):
    # 25 rows on each stamp, 3 s apart; one gap of a minute.
    stamps = [3000 * k + (60_000 if k >= 100 else 0) for k in range(200)]
    lines = [mooncake_line(stamp, 4, [1]) for stamp in stamps for _ in range(25)]
    binned = mooncake(tmp_path, lines).table.arrival_times
    spread = mooncake(tmp_path, lines, spread_bins=True).table.arrival_times
    assert (np.diff(spread) > 0).all()
    offset = spread - binned
    assert offset.min() >= 0
    assert offset.max() < 3
    assert offset.mean() == pytest.approx(1.5, abs=4 * 0.866 / 5000**0.5)

    def dispersion(times):
        counts = np.histogram(times, bins=np.arange(0, 299, 1.0))[0]
        return counts.var() / counts.mean()

    assert dispersion(binned) > 10
    assert dispersion(spread) < 1.2  # at most Poisson


BURST = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"


def test_burstgpt_by_name_and_failed_rows(tmp_path):
    text = (
        f"{BURST}5,ChatGPT,472,18,490,Conversation log\n45,ChatGPT,1087,0,1087,Conversation log\n"
        "118,GPT-4,417,276,693,API log\n118.5,GPT-4,0,3,3,API log\n120,ChatGPT,5,6,11,API log\n"
    )
    workload = BurstGPTWorkload(path=write(tmp_path, text), **COMMON)
    assert workload.table.prompt_lens.tolist() == [472, 417, 5]
    assert workload.table.arrival_times.tolist() == [0, 113, 115]
    assert "dropped 1 failed requests (Response tokens 0)" in workload.description
    assert "dropped 1 rows with Request tokens 0" in workload.description
    only = BurstGPTWorkload(path=write(tmp_path, text), model="ChatGPT", log_type="API log", **COMMON)
    assert only.table.prompt_lens.tolist() == [5]


def test_burstgpt_with_eight_columns_in_any_order(tmp_path):
    header = "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    text = f"{header}19440110.0,s-1,43,GPT-4,906,446,1352,Conversation log\n19440161.5,s-2,2,ChatGPT,36,29,65,API log\n"
    items = BurstGPTWorkload(path=write(tmp_path, text), **COMMON).items()
    assert [(i.arrival_time, len(i.prompt_token_ids), i.output_len, i.client_id) for i in items] == [
        (0.0, 906, 446, "s-1"),
        (51.5, 36, 29, "s-2"),
    ]


def test_vidur_with_and_without_times(tmp_path):
    timed = "arrived_at,num_prefill_tokens,num_decode_tokens,request_id\n0.25,591,140,0\n0.75,547,248,1\n"
    items = VidurWorkload(path=write(tmp_path, timed), **COMMON).items()
    assert [(i.arrival_time, len(i.prompt_token_ids), i.output_len) for i in items] == [
        (0.0, 591, 140),
        (0.5, 547, 248),
    ]
    untimed = "num_prefill_tokens,num_decode_tokens\n591,140\n"
    assert VidurWorkload(path=write(tmp_path, untimed), **COMMON).items()[0].arrival_time is None


def test_a_million_requests_stay_small(tmp_path):
    """Light items of a long replay: no prompt of its own per request."""
    workload = AzureTraceWorkload(path=write(tmp_path, AZURE), num_requests=1_000_000, repeat=True, **COMMON)
    light = workload.items_iter(with_token_ids=False)
    sample = list(itertools.islice(light, 2000))
    assert len({id(item.prompt_token_ids) for item in sample}) == 4
    assert [len(item.prompt_token_ids) for item in sample[:4]] == [4808, 3180, 110, 7]
