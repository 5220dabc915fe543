"""The KV maps of a comparison: one for each cell, small, all on one scale of time and of slots."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from matplotlib.figure import Figure

from kvarena.reports.comparing.repeats import Contender
from kvarena.reports.drawing.format import seconds
from kvarena.reports.drawing.kv_map import (
    Axis,
    KVMap,
    canvas_markup,
    draw_map,
    legend_markup,
    map_legend,
    read_kv_map,
    script_markup,
)
from kvarena.reports.drawing.panels import grid_of_panels
from kvarena.reports.drawing.style import WIDE
from kvarena.reports.reading.files import RunFiles

MOST_COLUMNS, MOST_ROWS = 400, 320  # of a small map
SLOTS, ADDRESSES = "KV slots", "addresses (slots)"


class CellMap(NamedTuple):
    """The map of a cell's first run."""

    label: str
    run: RunFiles
    kv_map: KVMap

    @property
    def block_size(self) -> int:
        """Slots of a block."""
        return int(self.run.manifest["pool"]["block_size"])

    @property
    def title(self) -> str:
        """The cell, and how long its run took."""
        return f"{self.label}: {seconds(self.kv_map.end)}"


def read_kv_maps(cells: Sequence[Contender]) -> list[CellMap]:
    """The maps of those cells whose first run recorded one. Raises ReportError: a file is broken."""
    found = [(cell, read_kv_map(cell.run, MOST_COLUMNS, MOST_ROWS)) for cell in cells]
    return [CellMap(cell.label, cell.run, kv_map) for cell, kv_map in found if kv_map is not None]


def shared_axes(maps: Sequence[CellMap]) -> list[Axis]:
    """An axis a map: one time for all, and the slots of the largest pool.

    Addresses of virtual regions are no slots of a pool and more of them than there are slots: they share an axis among
    themselves.
    """
    end = max(cell.kv_map.end for cell in maps)
    lengths: dict[bool, int] = {}
    for cell in maps:
        slots = cell.kv_map.num_blocks * cell.block_size
        lengths[cell.kv_map.mapped] = max(lengths.get(cell.kv_map.mapped, 0), slots)
    return [
        Axis(end, lengths[cell.kv_map.mapped], ADDRESSES if cell.kv_map.mapped else SLOTS, cell.block_size)
        for cell in maps
    ]


def kv_maps_markup(maps: Sequence[CellMap]) -> str:
    """The maps as HTML, as many in a row as fit."""
    panels = [
        f'<div class="kvmap"><p>{escape(cell.title)}</p>'
        f"{canvas_markup(cell.kv_map, cell.run, axis, f'KV map of {cell.title}')}<output></output></div>"
        for cell, axis in zip(maps, shared_axes(maps), strict=True)
    ]
    legend = legend_markup([cell.kv_map for cell in maps])
    return f'{legend}<div class="maps">{"".join(panels)}</div>{script_markup()}'


def kv_maps_figure(maps: Sequence[CellMap]) -> Figure:
    """The same as a still picture."""
    figure, panels, num_columns = grid_of_panels([cell.title for cell in maps], 2.1, WIDE)
    for index, (axes, cell, axis) in enumerate(zip(panels, maps, shared_axes(maps), strict=True)):
        draw_map(axes, cell.kv_map, axis)
        axes.set_ylabel(axis.label if index % num_columns == 0 or axis.label != SLOTS else "")
    map_legend(figure, [cell.kv_map for cell in maps])
    return figure
