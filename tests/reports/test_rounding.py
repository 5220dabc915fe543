"""Two runs that differ in a token: by rounding, by an error, or nobody knows; and what the box says."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_runs import fake_run

from kvarena.reports.comparing.rounding import (
    ERROR,
    NOT_RECORDED,
    ROUNDING,
    Candidates,
    Scores,
    judge,
    typical_difference,
)
from kvarena.reports.pages.comparison import compare
from kvarena.reports.pages.terminal import comparison_table

BF16 = 2.0**-7


def candidates(**scores):
    items = sorted(scores.items(), key=lambda item: -item[1])
    return Candidates(np.array([int(name[1:]) for name, _ in items]), np.array([value for _, value in items]))


@pytest.mark.parametrize(
    ("ours", "theirs", "verdict"),
    [
        # Nearly equal in both, and the runs differ by a few hundredths.
        ({"t1": 9.02, "t2": 9.00}, {"t1": 9.00, "t2": 9.03}, ROUNDING),
        # The picks are the largest of what was recorded, but a score moved by more than rounding moves it.
        ({"t1": 9.0, "t2": 5.0}, {"t1": 5.0, "t2": 9.0}, ERROR),
        # The runs agree in the scores, so the second did not pick its largest.
        ({"t1": 9.0, "t2": 8.0}, {"t1": 9.0, "t2": 8.0}, ERROR),
        # Neither run's other token was among the recorded ones: the last of them bounds it.
        ({"t1": 9.02, "t3": 9.0}, {"t2": 9.03, "t3": 9.0}, ROUNDING),
        ({"t1": 9.0, "t3": 2.0}, {"t2": 9.0, "t3": 2.0}, ERROR),
        # A filter dropped the other token in one run: its score is not known.
        ({"t1": 9.0, "t3": -np.inf}, {"t1": 8.9, "t2": 9.0}, NOT_RECORDED),
    ],
)
def test_a_first_differing_token_is_judged(ours, theirs, verdict):
    found = judge(candidates(**ours), candidates(**theirs), 1, 2, BF16)
    assert found.verdict == verdict
    turned = judge(candidates(**theirs), candidates(**ours), 2, 1, BF16)
    assert turned == found


def test_an_offset_between_the_runs_is_no_rounding():
    """Normalised in one run and not in the other, all scores are apart: said, and not taken for rounding."""
    assert judge(candidates(t1=9.0, t2=8.99), candidates(t1=0.0, t2=0.01), 1, 2, BF16).verdict == ERROR


def _pair(tmp_path, scores=None, dtype="bfloat16"):
    """Two runs that differ in output token 7 of request r0005, with what they recorded there."""
    for name, wrong in (("a", None), ("b", 7)):
        folder = fake_run(tmp_path / name, "paged" if name == "a" else "contiguous", num_requests=12, wrong_token=wrong)
        path = folder / "manifest.json"
        manifest = json.loads(path.read_text())
        manifest["model"]["dtype"] = dtype
        path.write_text(json.dumps(manifest))
        if scores:
            _write_scores(folder, scores[name])
    return compare([(name, tmp_path / name) for name in ("a", "b")], tmp_path / "out")


def _write_scores(folder, gap):
    """Every pick leads token 0 by `gap`; where the runs differ both tokens are there."""
    table = pq.read_table(folder / "requests.parquet").to_pydict()
    ids, values = [], []
    for request_id, tokens in zip(table["request_id"], table["output_token_ids"], strict=True):
        other = [token + (-1 if "b" in folder.name else 1) if request_id == "r0005" else 5000 for token in tokens]
        ids.append(np.stack([tokens, other], 1).reshape(-1) if tokens else [])
        values.append([9.0, 9.0 - gap] * len(tokens))
    columns = {
        "request_id": table["request_id"],
        "num_candidates": pa.array([2] * len(ids), pa.int32()),
        "token_ids": pa.array(ids, pa.list_(pa.int32())),
        "values": pa.array(values, pa.list_(pa.float64())),
    }
    pq.write_table(pa.table(columns), folder / "scores.parquet")


def test_rounding_is_counted_and_no_warning(tmp_path):
    same = _pair(tmp_path, {"a": 0.02, "b": 0.03})["same_tokens"]
    assert (same["verdict"], same["rounding"], same["errors"], same["not_recorded"]) == ("rounding", 1, 0, 0)
    assert same["line"] == (
        "Tokens differ in 1 of 10 requests, judged at each one's first differing token: 1 by rounding, 0 by errors."
    )
    page = (tmp_path / "out" / "report.html").read_text()
    assert 'class="verdict"' in page and "1 by rounding, 0 by errors" in page


def test_an_error_is_counted_and_a_warning(tmp_path):
    summary = _pair(tmp_path, {"a": 4.0, "b": 4.0})
    same = summary["same_tokens"]
    assert (same["verdict"], same["rounding"], same["errors"]) == ("different", 0, 1)
    assert "0 by rounding, 1 by errors. First divergence: contiguous × continuous" in same["line"]
    assert 'class="verdict bad"' in (tmp_path / "out" / "report.html").read_text()
    assert same["line"] in comparison_table(summary).caption.replace("\\", "")


def test_without_recorded_scores_nothing_is_claimed(tmp_path):
    same = _pair(tmp_path)["same_tokens"]
    assert (same["verdict"], same["rounding"], same["errors"], same["not_recorded"]) == ("not decided", 0, 0, 1)
    assert same["line"].startswith(
        "Tokens differ in 1 of 10 requests; whether by rounding was not recorded: driver.scores=8 records it."
    )


def test_in_float32_every_difference_is_an_error(tmp_path):
    same = _pair(tmp_path, {"a": 0.0, "b": 0.0}, dtype="float32")["same_tokens"]
    assert (same["verdict"], same["errors"], same["rounding"]) == ("different", 1, 0)


def test_runs_with_other_random_streams_are_not_compared(tmp_path):
    for seed in (0, 1):
        config = {"engine": {"seed": seed}, "sampling": {"temperature": 0.7}}
        fake_run(tmp_path / str(seed), num_requests=8, wrong_token=seed or None, config=config)
    same = compare([(name, tmp_path / name) for name in "01"], tmp_path / "out")["same_tokens"]
    assert same["verdict"] == "not compared"


def _scores(values):
    """One request, two candidates a token."""
    flat = np.asarray(values, dtype=float).reshape(-1)
    token_ids = np.tile([7, 8], len(flat) // 2)
    columns = (pa.array([column], pa.large_list(pa.from_numpy_dtype(column.dtype))) for column in (token_ids, flat))
    return Scores({"r": 0}, np.array([2]), *columns)


def test_the_typical_difference_is_that_of_equal_prefixes():
    rng = np.random.default_rng(0)
    values = rng.normal(8, 1, (200, 2))
    noise = rng.normal(0, 0.01, (200, 2))
    noise[150:] = 5.0  # behind the first differing token
    ours, theirs = _scores(values), _scores(values + noise)
    typical = typical_difference(ours, theirs, {"r": 150, "unknown": 3})
    assert typical == pytest.approx(0.01 * 0.6745, rel=0.15)
    assert typical_difference(ours, theirs, {"r": 20}) is None  # 40 values
    assert typical_difference(ours, ours, {"r": 150}) == 0  # nothing moved, so nothing rounds


def test_where_rounding_is_small_a_small_difference_is_an_error():
    """0.2 of 9 is within 32 units of bfloat16, and far from what these two runs round."""
    ours, theirs = candidates(t1=9.0, t2=8.8), candidates(t1=8.8, t2=9.0)
    assert judge(ours, theirs, 1, 2, BF16).verdict == ROUNDING
    assert judge(ours, theirs, 1, 2, BF16, typical=0.03).verdict == ROUNDING
    assert judge(ours, theirs, 1, 2, BF16, typical=0.001).verdict == ERROR
    assert judge(ours, theirs, 1, 2, BF16, typical=0.0).verdict == ERROR


def test_over_http_no_remedy_is_promised(tmp_path):
    """A server shows no scores and says no dtype."""
    _pair(tmp_path, dtype="as served")
    path = tmp_path / "b" / "manifest.json"
    manifest = json.loads(path.read_text())
    target = {"url": "http://x", "model": "m", "extensions_refused": [], "num_other_prompt_lens": 0, "gauges": None}
    path.write_text(json.dumps(manifest | {"target": target}))
    same = compare([(name, tmp_path / name) for name in ("a", "b")], tmp_path / "out2")["same_tokens"]
    assert same["verdict"] == "not decided"
    assert "whether by rounding is not known: a server shows no scores." in same["line"]
