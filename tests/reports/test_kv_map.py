"""The KV map: what the snapshots become, and the data that the page decodes."""

import base64
import io
import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_runs import KV_MAP_SCHEMA, fake_run
from PIL import Image

from reports.errors import ReportError
from reports.files import read_run
from reports.kv_map import FIRST_CODE, FREE, KVMap, choose_shades, kv_map_markup, paint, read_kv_map
from reports.run_report import write_run_report


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A contiguous run with snapshots."""
    return read_run(fake_run(tmp_path_factory.mktemp("runs") / "run", "contiguous", num_requests=24, kv_map=True))


def test_grid_shows_the_snapshots(run):
    kv_map = read_kv_map(run)
    snapshots = pq.read_table(run.path / "kv_map.parquet").to_pylist()
    num_rows, num_columns = kv_map.owner.shape
    assert num_rows == kv_map.num_blocks == 480
    for column in (num_columns // 3, num_columns - 1):
        time = kv_map.end * column / num_columns
        shown = [snapshot for snapshot in snapshots if snapshot["time"] <= time][-1]
        assert kv_map.owner[:, column].tolist() == shown["owner"]
        assert (kv_map.filled[:, column] * 16).tolist() == shown["filled"]
    assert (kv_map.owner[:, 0] == FREE).all()  # before the first step


def test_a_contiguous_request_is_one_run_of_blocks(run):
    kv_map = read_kv_map(run)
    column = kv_map.owner[:, kv_map.owner.shape[1] // 2]
    for row in np.unique(column[column >= 0]):
        assert np.ptp(np.flatnonzero(column == row)) == 63


def test_page_data_decodes_to_the_map(run):
    kv_map = read_kv_map(run)
    markup = kv_map_markup(kv_map, run)
    spec = json.loads(re.search(r'application/json">(.*?)</script>', markup).group(1))
    encoded = re.search(r"base64,([^\"]*)", markup).group(1)
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded)))).astype(np.int64)
    rows = spec["rows"]
    owner = (pixels[:rows, :, 0] << 16 | pixels[:rows, :, 1] << 8 | pixels[:rows, :, 2]) - FIRST_CODE
    assert (owner == kv_map.owner).all()
    assert np.abs(pixels[rows:, :, 0] / 255 - kv_map.filled).max() < 1 / 255
    assert {int(row) for row in spec["requests"]} == set(np.unique(owner[owner >= 0]).tolist())


def test_neighbours_have_different_shades(run):
    kv_map = read_kv_map(run)
    shades = choose_shades(kv_map)
    table = np.array([shades.get(row, -1) for row in range(run.num_requests)])
    before, after = kv_map.owner[:, :-1], kv_map.owner[:, 1:]
    meet = (before != after) & (before >= 0) & (after >= 0)
    assert meet.any()
    assert (table[before[meet]] != table[after[meet]]).all()


def test_empty_slots_are_paler():
    kv_map = KVMap(np.array([[0, 0, FREE]]), np.array([[1.0, 0.0, 0.0]]), 1.0, 1)
    full, empty, free = paint(kv_map, {0: 0})[0].astype(int)
    assert empty.sum() > full.sum() + 100
    assert len(set(free.tolist())) <= 3


def test_large_pools_are_thinned(tmp_path):
    run_dir = fake_run(tmp_path / "run", num_requests=6)
    owner = np.repeat(np.arange(6), 5000)
    row = {"step": 0, "time": 0.0, "owner": owner.tolist(), "filled": [16] * 30000, "stride": 2}
    pq.write_table(pa.Table.from_pylist([row], KV_MAP_SCHEMA), run_dir / "kv_map.parquet")
    kv_map = read_kv_map(read_run(run_dir))
    assert kv_map.owner.shape[0] == 1024
    assert kv_map.num_blocks == 60000
    assert np.unique(kv_map.owner).tolist() == [0, 1, 2, 3, 4, 5]


def test_report_without_and_with_a_map(tmp_path):
    run_dir = fake_run(tmp_path / "run", num_requests=6)
    assert read_kv_map(read_run(run_dir)) is None
    fake_run(tmp_path / "mapped", num_requests=6, kv_map=True)
    write_run_report(tmp_path / "mapped")
    assert "<canvas" in (tmp_path / "mapped" / "report.html").read_text()
    assert (tmp_path / "mapped" / "figures" / "kv_map.png").exists()


@pytest.mark.parametrize("fault", ["owner", "ragged", "bytes"])
def test_a_broken_map_is_one_line(tmp_path, fault):
    run_dir = fake_run(tmp_path / "run", num_requests=6, kv_map=True)
    path = run_dir / "kv_map.parquet"
    rows = pq.read_table(path).to_pylist()
    if fault == "owner":
        rows[5]["owner"][3] = 99
    elif fault == "ragged":
        rows[5]["owner"].pop()
    pq.write_table(pa.Table.from_pylist(rows, KV_MAP_SCHEMA), path)
    if fault == "bytes":
        path.write_bytes(b"no parquet")
    with pytest.raises(ReportError, match=r"kv_map\.parquet"):
        read_kv_map(read_run(run_dir))
