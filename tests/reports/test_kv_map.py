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
from matplotlib.colors import to_rgb
from PIL import Image

from kvarena.reports.comparing.kv_maps import ADDRESSES, SLOTS, CellMap, kv_maps_figure, kv_maps_markup, shared_axes
from kvarena.reports.drawing.kv_map import (
    COLORS,
    EXTERNAL,
    FIRST_CODE,
    FREE,
    SHADES,
    SHORTAGE,
    KVMap,
    choose_shades,
    kv_map_figure,
    kv_map_markup,
    paint,
    read_kv_map,
)
from kvarena.reports.drawing.style import CLASS_LOOKS
from kvarena.reports.pages.comparison import compare
from kvarena.reports.pages.run_report import write_run_report
from kvarena.reports.reading.errors import ReportError
from kvarena.reports.reading.files import read_run


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
        owner = kv_map.owner[:, column]
        assert np.where(np.isin(owner, (EXTERNAL, SHORTAGE)), FREE, owner).tolist() == shown["owner"]
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


def test_what_nobody_owns_has_its_class_of_the_step(tmp_path):
    """One free, one external, one short step; beside them a block that a rounded up region takes."""
    run_dir = fake_run(tmp_path / "run", num_requests=6)
    steps = pq.read_table(run_dir / "steps.parquet")
    num_steps, size = len(steps), 16
    classes = {name: np.zeros(num_steps, dtype=np.int64) for name in ("external", "shortage", "free")}
    chosen = [num_steps * i // 4 for i in range(4)]
    for begin, name in zip(chosen, ("free", "external", "shortage", "free"), strict=True):
        for other, slots in classes.items():
            slots[begin:] = (size if other == "external" else 0) + (2 * size if other == name else 0)
    rest = {"token_states": 3 * size, "total": 6 * size} | dict.fromkeys(("reservation", "internal", "cached"), 0)
    for name, values in (classes | {name: np.full(num_steps, value) for name, value in rest.items()}).items():
        steps = steps.set_column(steps.column_names.index(name), name, pa.array(values))
    pq.write_table(steps, run_dir / "steps.parquet")
    starts = steps.column("start_time").to_pylist()
    rows = [
        {"step": step, "time": starts[step], "owner": [3, 3, 3, EXTERNAL, FREE, FREE], "filled": [16] * 3 + [0] * 3,
         "stride": 1}
        for step in chosen
    ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows, KV_MAP_SCHEMA), run_dir / "kv_map.parquet")
    run = read_run(run_dir)
    kv_map = read_kv_map(run)
    seen = {tuple(column) for column in kv_map.owner.T.tolist()}
    assert kv_map.owner[:, -1].tolist() == [3, 3, 3, EXTERNAL, FREE, FREE]
    assert seen - {(FREE,) * 6} == {(3, 3, 3, EXTERNAL, one, one) for one in (FREE, EXTERNAL, SHORTAGE)}
    colors = paint(kv_map, choose_shades(kv_map))
    for owner, name in ((EXTERNAL, "external"), (SHORTAGE, "shortage")):
        assert np.unique(colors[kv_map.owner == owner], axis=0).tolist() == [
            [round(255 * channel) for channel in to_rgb(CLASS_LOOKS[name].color)]
        ]
    markup = kv_map_markup(kv_map, run)
    spec = json.loads(re.search(r'application/json">(.*?)</script>', markup).group(1))
    assert spec["nobody"][str(SHORTAGE)] == ["shortage", CLASS_LOOKS["shortage"].color]
    assert ">shortage</span>" in markup and ">external fragmentation</span>" in markup
    labels = [text.get_text() for text in kv_map_figure(kv_map).legends[0].get_texts()]
    assert labels[2:] == ["free", "external fragmentation", "shortage"]


def test_no_request_has_a_class_s_colour():
    assert not set(SHADES) & set(COLORS.values()) and len(set(SHADES)) == len(SHADES)


def test_unmapped_addresses_are_not_called_free_memory():
    names = KVMap(np.array([[SHORTAGE]]), np.zeros((1, 1)), 1.0, 1, mapped=True).names()
    assert names[FREE] == "not mapped" and names[SHORTAGE].startswith("not mapped; free pages: ")


def _specs(markup):
    return [json.loads(text) for text in re.findall(r'application/json">(.*?)</script>', markup)]


def test_maps_of_a_comparison_have_one_scale_of_time_and_of_slots(run, tmp_path):
    """A pool of half the size with blocks of half the size, a run of half the time, and addresses of a region."""
    other = read_run(fake_run(tmp_path / "run", num_requests=24, total=3840, block_size=8))
    whole = read_kv_map(run, 100, 60)
    assert whole.owner.shape == (60, 100)
    halved = KVMap(whole.owner, whole.filled, whole.end / 2, 480)
    virtual = KVMap(whole.owner, whole.filled, whole.end / 4, 9000, mapped=True)
    maps = [CellMap("a & b", run, whole), CellMap("small", other, halved), CellMap("virtual", run, virtual)]
    assert [(axis.end, axis.length, axis.label) for axis in shared_axes(maps)] == [
        (whole.end, 7680, SLOTS), (whole.end, 7680, SLOTS), (whole.end, 144000, ADDRESSES),
    ]  # fmt: skip
    markup = kv_maps_markup(maps)
    specs = _specs(markup)
    assert len({(spec["axisEnd"], spec["axisLength"]) for spec in specs[:2]}) == 1
    assert [spec["numBlocks"] * spec["unit"] for spec in specs] == [7680, 3840, 144000]
    assert markup.count('<canvas role="img" aria-label="KV map of ') == 3
    assert "a &amp; b: " in markup and markup.count('querySelectorAll(".kvmap")') == 1
    panels = [axes for axes in kv_maps_figure(maps).axes if axes.get_visible()]
    assert [axes.get_ylim() for axes in panels] == [(7680, 0), (7680, 0), (144000, 0)]
    assert len({axes.get_xlim() for axes in panels}) == 1


def test_a_comparison_shows_the_maps_that_there_are_and_names_the_others(run, tmp_path):
    other = fake_run(tmp_path / "other", "paged", num_requests=24)
    compare([("one", run.path), ("other", other)], tmp_path / "comparison")
    page = (tmp_path / "comparison" / "report.html").read_text()
    assert len(_specs(page)) == 1 and "Recorded none: paged × continuous." in page
    assert (tmp_path / "comparison" / "figures" / "kv_maps.png").exists()
