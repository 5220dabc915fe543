"""The KV map: time across, blocks down, coloured by request. It shows fragmentation at a glance.

Drawn when the run recorded kv_map.parquet (docs/files.md): snapshots of which request owns each block and how many of
its slots are filled. The page gets a zoomable canvas whose data is a PNG in the page; the PNG file serves slides.
"""

from __future__ import annotations

import base64
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image

from reports.errors import ReportError
from reports.files import REMEDY, Ragged, RunFiles, read_table
from reports.style import EMPTY, INK, new_figure

FILE = "kv_map.parquet"
SHARED, CACHED, FREE = -3, -2, -1  # owners that are no request
FIRST_CODE = 3  # owner + FIRST_CODE is not negative
MAX_COLUMNS, MAX_ROWS = 800, 1024
# Okabe-Ito without the greys, each in a dark and a light shade; neighbours in the list differ in lightness.
SHADES = ("#0072B2", "#F0B84A", "#7A3B00", "#8CCDF2", "#00664A", "#E8A3CC", "#994400", "#56B4E9", "#5B2A4C", "#7FD1B6",
          "#004A75", "#F5D76E", "#D55E00", "#009E73", "#CC79A7", "#E69F00")  # fmt: skip
CACHED_COLOR, SHARED_COLOR = "#a9b0b8", "#3a3f47"
TINT = 0.72  # how far an empty slot's colour is moved to white


@dataclass(frozen=True, slots=True)
class KVMap:
    """A picture's data, on a regular grid of time and blocks.

    Attributes:
        owner: int32 [rows, columns]: row in requests.parquet, or SHARED, CACHED, FREE.
        filled: float [rows, columns]: share of the block's slots that hold computed tokens.
        end: seconds at the right edge; the left one is 0.
        num_blocks: blocks of the pool, from top to bottom.
    """

    owner: np.ndarray
    filled: np.ndarray
    end: float
    num_blocks: int


def read_kv_map(run: RunFiles) -> KVMap | None:
    """Read and thin the snapshots; None when the run recorded none, or had no step.

    Raises:
        ReportError: the file is broken.
    """
    path = run.path / FILE
    if not path.exists():
        return None
    table = read_table(path, ("time", "owner", "filled", "stride"))
    times = table.column("time").to_numpy()
    if not len(times) and not run.num_steps:
        return None
    owner, filled = (Ragged.of(table.column(name), path, name) for name in ("owner", "filled"))
    widths = np.diff(owner.offsets)
    strides = table.column("stride").to_pylist()
    if (
        not len(times)
        or None in strides
        or len(set(strides)) != 1
        or not widths.all()
        or len(set(widths)) != 1
        or not np.array_equal(owner.offsets, filled.offsets)
    ):
        raise ReportError(f"{path}: snapshots must be of one pool, with an owner and a fill for every block; {REMEDY}")
    num_blocks, stride = int(widths[0]), int(strides[0])
    end = float(max(run.steps["end_time"].max() if run.num_steps else 0.0, times[-1], 1e-9))
    columns = np.linspace(0, end, min(MAX_COLUMNS, 4 * len(times)), endpoint=False)
    snapshots = np.searchsorted(times, columns, side="right") - 1
    blocks = np.linspace(0, num_blocks, min(MAX_ROWS, num_blocks), endpoint=False).astype(int)
    grid_owner = owner.values.reshape(-1, num_blocks)[np.maximum(snapshots, 0)][:, blocks].T.astype(np.int32)
    grid_filled = filled.values.reshape(-1, num_blocks)[np.maximum(snapshots, 0)][:, blocks].T
    if grid_owner.size and not SHARED <= grid_owner.min() <= grid_owner.max() < run.num_requests:
        raise ReportError(f"{path}: an owner is no row of requests.parquet; {REMEDY}")
    grid_owner[:, snapshots < 0] = FREE
    block_size = run.manifest["pool"].get("block_size") or 0
    if block_size < 1:
        raise ReportError(f"{path}: manifest.json gives its blocks no size (pool.block_size); {REMEDY}")
    return KVMap(grid_owner, np.clip(grid_filled / block_size, 0, 1), end, num_blocks * stride)


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
    for owner, color in ((SHARED, SHARED_COLOR), (CACHED, CACHED_COLOR), (FREE, EMPTY)):
        colors[kv_map.owner == owner] = to_rgb(color)
    return (255 * colors).round().astype(np.uint8)


def kv_map_figure(kv_map: KVMap) -> Figure:
    """The map as a still picture."""
    figure = new_figure(4.6)
    axes = figure.subplots()
    extent = (0.0, kv_map.end, float(kv_map.num_blocks), 0.0)
    axes.imshow(paint(kv_map, choose_shades(kv_map)), extent=extent, aspect="auto", interpolation="nearest")
    axes.set_xlabel("time since the start of the run (s)")
    axes.set_ylabel("KV block")
    axes.tick_params(length=0)
    handles = [Patch(facecolor=SHADES[0], label="a request's block, full"),
               Patch(facecolor=_tinted(SHADES[0]), label="the same, empty"),
               Patch(facecolor=EMPTY, label="free")]  # fmt: skip
    for owner, color, label in ((CACHED, CACHED_COLOR, "cached prefix"), (SHARED, SHARED_COLOR, "shared by requests")):
        if (kv_map.owner == owner).any():
            handles.append(Patch(facecolor=color, label=label))
    figure.legend(handles=handles, loc="outside upper left", ncols=len(handles), labelcolor=INK)
    return figure


def _tinted(color: str) -> tuple[float, float, float]:
    red, green, blue = (1 - (1 - channel) * (1 - TINT) for channel in to_rgb(color))
    return red, green, blue


def kv_map_markup(kv_map: KVMap, run: RunFiles) -> str:
    """The zoomable map as HTML: a canvas, its data, and the script that paints it."""
    data = {
        "end": kv_map.end,
        "numBlocks": kv_map.num_blocks,
        "blockSize": int(run.manifest["pool"]["block_size"]),
        "rows": kv_map.owner.shape[0],
        "columns": kv_map.owner.shape[1],
        "shades": list(SHADES),
        "shared": SHARED_COLOR,
        "cached": CACHED_COLOR,
        "tint": TINT,
        "requests": {
            str(row): [str(run.requests["request_id"][row]), shade] for row, shade in choose_shades(kv_map).items()
        },
    }
    script = (Path(__file__).parent / "templates" / "kv_map.js").read_text(encoding="utf-8")
    return (
        '<div class="kvmap"><div class="bar"><button type="button" data-zoom="0.5" title="zoom in">+</button>'
        '<button type="button" data-zoom="2" title="zoom out">−</button>'
        '<button type="button" data-zoom="0" title="the whole map">reset</button>'
        "<output>Drag to move; Ctrl and wheel, or the buttons, to zoom; point at a block to see whose it is.</output>"
        "</div>"
        f'<canvas tabindex="0"></canvas><img alt="" hidden src="{_encode(kv_map)}">'
        f'<script type="application/json">{_json(data)}</script></div><script>{script}</script>'
    )


def _json(data: Any) -> str:
    return json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")


def _encode(kv_map: KVMap) -> str:
    """Owners (24 bits in RGB) above, fills (red) below, as a PNG data URI."""
    codes = (kv_map.owner + FIRST_CODE).astype(np.uint32)
    owners = np.stack([codes >> 16 & 255, codes >> 8 & 255, codes & 255], axis=-1).astype(np.uint8)
    fills = np.zeros_like(owners)
    fills[..., 0] = (255 * kv_map.filled).round()
    buffer = io.BytesIO()
    Image.fromarray(np.concatenate([owners, fills])).save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
