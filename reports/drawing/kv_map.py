"""The KV map: time across, blocks down, coloured by request. It shows fragmentation at a glance.

Drawn when the run recorded kv_map.parquet (docs/files.md): snapshots of which request owns each block and how many of
its slots are filled. The page gets a zoomable canvas whose data is a PNG in the page; the PNG file serves slides.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image

from kvarena.reports.drawing.style import CLASS_LOOKS, EMPTY, INK, THEME, new_figure, whole
from kvarena.reports.reading.errors import ReportError
from kvarena.reports.reading.files import REMEDY, RunFiles, as_lists, flat, read_table
from kvarena.reports.reading.names import KV_MAP_FILE

SHORTAGE, EXTERNAL, SHARED, CACHED, FREE = -5, -4, -3, -2, -1  # owners that are no request
FIRST_CODE = 5  # owner + FIRST_CODE is not negative
MAX_COLUMNS, MAX_ROWS = 800, 1024
# Near Okabe-Ito, without the greys and the colours of the ledger's classes below; neighbours in the list differ in
# lightness.
SHADES = ("#0072B2", "#F0B84A", "#7A3B00", "#8CCDF2", "#00664A", "#E8A3CC", "#994400", "#B9D989", "#5B2A4C", "#7FD1B6",
          "#004A75", "#F5D76E", "#D55E00", "#009E73", "#C9B2E8", "#E69F00")  # fmt: skip
CACHED_COLOR, SHARED_COLOR = "#a9b0b8", "#3a3f47"
COLORS = {FREE: EMPTY, EXTERNAL: CLASS_LOOKS["external"].color, SHORTAGE: CLASS_LOOKS["shortage"].color,
          CACHED: CACHED_COLOR, SHARED: SHARED_COLOR}  # fmt: skip
TINT = 0.72  # how far an empty slot's colour is moved to white


@dataclass(frozen=True, slots=True)
class KVMap:
    """A picture's data, on a regular grid of time and blocks.

    Attributes:
        owner: int32 [rows, columns]: row in requests.parquet, or SHARED, CACHED, and of what nobody owns the ledger's
            class: FREE, EXTERNAL, SHORTAGE.
        filled: float [rows, columns]: share of the block's slots that hold computed tokens.
        end: seconds at the right edge; the left one is 0.
        num_blocks: blocks of the pool, from top to bottom.
        mapped: blocks are addresses of virtual regions: those that nobody owns are no memory, and their class is that
            of the pool's free pages.
    """

    owner: np.ndarray
    filled: np.ndarray
    end: float
    num_blocks: int
    mapped: bool = False

    def names(self) -> dict[int, str]:
        """What the owners that are no request are called."""
        names = {SHARED: "shared by requests", CACHED: "cached prefix"}
        if not self.mapped:
            return names | {FREE: "free", EXTERNAL: "external fragmentation", SHORTAGE: "shortage"}
        return names | {
            FREE: "not mapped",
            EXTERNAL: "not mapped; free pages: external fragmentation",
            SHORTAGE: "not mapped; free pages: shortage",
        }


def read_kv_map(run: RunFiles, most_columns: int = MAX_COLUMNS, most_rows: int = MAX_ROWS) -> KVMap | None:
    """Read and thin the snapshots; None when the run recorded none, or had no step.

    Raises:
        ReportError: the file is broken.
    """
    path = run.path / KV_MAP_FILE
    if not path.exists():
        return None
    table = read_table(path, ("step", "time", "owner", "filled", "stride"))
    times = table.column("time").to_numpy()
    if not len(times) and not run.num_steps:
        return None
    owner, filled = (as_lists(table.column(name), path, name) for name in ("owner", "filled"))
    widths = owner.value_lengths().to_numpy()
    strides = table.column("stride").to_pylist()
    if (
        not len(times)
        or None in strides
        or len(set(strides)) != 1
        or not widths.all()
        or len(set(widths)) != 1
        or not owner.value_lengths().equals(filled.value_lengths())
    ):
        raise ReportError(f"{path}: snapshots must be of one pool, with an owner and a fill for every block; {REMEDY}")
    num_blocks, stride = int(widths[0]), int(strides[0])
    end = float(max(run.steps["end_time"].max() if run.num_steps else 0.0, times[-1], 1e-9))
    columns = np.linspace(0, end, min(most_columns, 4 * len(times)), endpoint=False)
    snapshots = np.searchsorted(times, columns, side="right") - 1
    blocks = np.linspace(0, num_blocks, min(most_rows, num_blocks), endpoint=False).astype(int)
    chosen = np.maximum(snapshots, 0)
    grid_owner = flat(owner).reshape(-1, num_blocks)[chosen][:, blocks].T.astype(np.int32)
    grid_filled = flat(filled).reshape(-1, num_blocks)[chosen][:, blocks].T
    if grid_owner.size and not EXTERNAL <= grid_owner.min() <= grid_owner.max() < run.num_requests:
        raise ReportError(f"{path}: an owner is no row of requests.parquet; {REMEDY}")
    unowned = _class_of_free(run, table.column("step").to_numpy(), path)[chosen]
    grid_owner = np.where(grid_owner == FREE, unowned, grid_owner)
    grid_owner[:, snapshots < 0] = FREE
    block_size = run.manifest["pool"].get("block_size") or 0
    if block_size < 1:
        raise ReportError(f"{path}: manifest.json gives its blocks no size (pool.block_size); {REMEDY}")
    filled_share = np.clip(grid_filled / block_size, 0, 1)
    return KVMap(grid_owner, filled_share, end, num_blocks * stride, "pages" in run.manifest["pool"])


def _class_of_free(run: RunFiles, steps: np.ndarray, path: Path) -> np.ndarray:
    """FREE, EXTERNAL or SHORTAGE for each snapshot's step: all free blocks of a step are of one class.

    What rounded up regions take beside their own is external fragmentation in every step, and in the map where it
    lies. Free blocks are it only where none is free or short.
    """
    row = np.searchsorted(run.steps["step"], steps)
    if (row >= run.num_steps).any() or not np.array_equal(run.steps["step"][row], steps):
        raise ReportError(f"{path}: a snapshot of a step that steps.parquet has not; {REMEDY}")
    external, shortage, free = (run.steps[name][row] > 0 for name in ("external", "shortage", "free"))
    return np.select([shortage, external & ~free], [SHORTAGE, EXTERNAL], FREE).astype(np.int32)


def choose_shades(kv_map: KVMap) -> dict[int, int]:
    """Row of each request in the map -> index into SHADES, such that neighbours in time or in the pool differ.

    Greedy colouring; with more neighbours than shades, some must share.
    """
    owner = kv_map.owner
    across = np.stack([owner[:, :-1].ravel(), owner[:, 1:].ravel()])
    down = np.stack([owner[:-1].ravel(), owner[1:].ravel()])
    pairs = np.concatenate([across, down], axis=1)
    pairs = np.unique(np.sort(pairs[:, (pairs[0] != pairs[1]) & (pairs.min(axis=0) >= 0)], axis=0), axis=1)
    neighbours: dict[int, list[int]] = {int(row): [] for row in np.unique(owner[owner >= 0])}
    for one, other in pairs.T.tolist():
        neighbours[one].append(other)
        neighbours[other].append(one)
    shades: dict[int, int] = {}
    for row, near in neighbours.items():
        taken = {shades.get(other) for other in near}
        order = [(row + offset) % len(SHADES) for offset in range(len(SHADES))]
        shades[row] = next((shade for shade in order if shade not in taken), order[0])
    return shades


def paint(kv_map: KVMap, shades_of: dict[int, int]) -> np.ndarray:
    """Colours as uint8 [rows, columns, 3]: a request's own shade, paler the emptier the block is."""
    shades = np.array([to_rgb(color) for color in SHADES])
    table = np.zeros(max(shades_of, default=0) + 1, dtype=np.int64)
    table[list(shades_of)] = list(shades_of.values())
    colors = shades[table[np.maximum(kv_map.owner, 0)]]
    colors = 1 - (1 - colors) * (1 - TINT * (1 - kv_map.filled[..., None]))
    for owner, color in COLORS.items():
        colors[kv_map.owner == owner] = to_rgb(color)
    return (255 * colors).round().astype(np.uint8)


def kv_map_figure(kv_map: KVMap) -> Figure:
    """The map as a still picture."""
    figure = new_figure(4.6)
    axes = figure.subplots()
    draw_map(axes, kv_map, own_axis(kv_map))
    axes.set_xlabel("time since the start of the run (s)")
    axes.set_ylabel("KV block")
    map_legend(figure, [kv_map])
    return figure


def draw_map(axes: Axes, kv_map: KVMap, axis: Axis) -> None:
    """A map on an axis that may be longer than it is."""
    extent = (0.0, kv_map.end, float(kv_map.num_blocks * axis.unit), 0.0)
    axes.imshow(paint(kv_map, choose_shades(kv_map)), extent=extent, aspect="auto", interpolation="nearest")
    axes.set_xlim(0, axis.end)
    axes.set_ylim(axis.length, 0)
    whole(axes)
    axes.tick_params(length=0)


def map_legend(figure: Figure, maps: Sequence[KVMap]) -> None:
    """What the colours of these maps mean, above them."""
    others = {name: color for kv_map in maps for _, name, color in shown(kv_map)}
    red, green, blue = (1 - (1 - channel) * (1 - TINT) for channel in to_rgb(SHADES[0]))
    handles = [Patch(facecolor=SHADES[0], label="a request's block, full"),
               Patch(facecolor=(red, green, blue), label="the same, empty")]  # fmt: skip
    handles += [Patch(facecolor=color, label=name) for name, color in others.items()]
    figure.legend(handles=handles, loc="outside upper left", ncols=min(len(handles), 4), labelcolor=INK)


def shown(kv_map: KVMap) -> list[tuple[int, str, str]]:
    """Owner, name and colour of what the map shows that is no request's."""
    names = kv_map.names()
    return [(owner, names[owner], color) for owner, color in COLORS.items() if (kv_map.owner == owner).any()]


def kv_map_markup(kv_map: KVMap, run: RunFiles) -> str:
    """The zoomable map as HTML: a canvas, its data, and the script that paints it."""
    bar = (
        '<div class="bar"><button type="button" data-zoom="0.5" title="zoom in">+</button>'
        '<button type="button" data-zoom="2" title="zoom out">−</button>'
        '<button type="button" data-zoom="0" title="the whole map">reset</button>'
        "<output>Drag to move; Ctrl and wheel, or the buttons, to zoom; point at a block to see whose it is.</output>"
        f"</div>{legend_markup([kv_map])}"
    )
    canvas = canvas_markup(kv_map, run, own_axis(kv_map))
    return f'<div class="kvmap">{bar}{canvas}</div>{script_markup()}'


@dataclass(frozen=True, slots=True)
class Axis:
    """What a map's canvas shows.

    Attributes:
        end: seconds at the right edge.
        length: of the axis down, in units.
        label: of that axis.
        unit: units of a block: 1 for blocks, its slots for slots.
    """

    end: float
    length: float
    label: str
    unit: int


def own_axis(kv_map: KVMap) -> Axis:
    """The axis of a map that stands alone."""
    return Axis(kv_map.end, kv_map.num_blocks, "KV block", 1)


def legend_markup(maps: Sequence[KVMap]) -> str:
    """What the colours of these maps that are no request's mean."""
    others = {name: color for kv_map in maps for _, name, color in shown(kv_map)}
    items = (
        f'<span><i style="background:{THEME.get(color, color)}"></i>{name}</span>' for name, color in others.items()
    )
    return f'<div class="legend">{"".join(items)}</div>'


def script_markup() -> str:
    """The script that paints all maps of a page; stands behind them."""
    script = (Path(__file__).parent / "templates" / "kv_map.js").read_text(encoding="utf-8")
    return f"<script>{script}</script>"


def canvas_markup(kv_map: KVMap, run: RunFiles, axis: Axis, label: str = "") -> str:
    """A map's canvas and its data; `label`: for who cannot see it, where that is not the figure's."""
    data = {
        "end": kv_map.end,
        "axisEnd": axis.end,
        "axisLength": axis.length,
        "axisLabel": axis.label,
        "unit": axis.unit,
        "numBlocks": kv_map.num_blocks,
        "blockSize": int(run.manifest["pool"]["block_size"]),
        "rows": kv_map.owner.shape[0],
        "columns": kv_map.owner.shape[1],
        "shades": list(SHADES),
        "firstCode": FIRST_CODE,
        "nobody": {str(owner): [name, color if color != EMPTY else "--empty"] for owner, name, color in shown(kv_map)},
        "tint": TINT,
        "requests": {
            str(row): [str(run.requests["request_id"][row]), shade] for row, shade in choose_shades(kv_map).items()
        },
    }
    name = f' role="img" aria-label="{escape(label)}"' if label else ""
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    return (
        f'<canvas{name} tabindex="0"></canvas><img alt="" hidden src="{_encode(kv_map)}">'
        f'<script type="application/json">{text}</script>'
    )


def _encode(kv_map: KVMap) -> str:
    """Owners (24 bits in RGB) above, fills (red) below, as a PNG data URI."""
    codes = (kv_map.owner + FIRST_CODE).astype(np.uint32)
    owners = np.stack([codes >> 16 & 255, codes >> 8 & 255, codes & 255], axis=-1).astype(np.uint8)
    fills = np.zeros_like(owners)
    fills[..., 0] = (255 * kv_map.filled).round()
    buffer = io.BytesIO()
    Image.fromarray(np.concatenate([owners, fills])).save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
