"""Drawings of layer graphs as SVG and PNG files.

Matplotlib's `Figure` alone: no pyplot, no display, no Graphviz. All lengths are inches.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from pccheck_ext import _sheet
from pccheck_ext._sheet import AGAIN, BOX, COLOURS, DIRECT, LANE, PADDING, SKIP, STRIP, Arc, Box

if TYPE_CHECKING:
    import networkx
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw", "figure", "paths", "resolution"]

DEFAULT_PATH = "dependency_graph"
SUFFIXES = (".svg", ".png")

_DPI, _MOST_PIXELS = 120, 1 << 26
_PORT = 0.08  # from a box's middle to where arcs leave it and arrive
_INK, _FAINT = "#1a1a1a", "#4a4a4a"
_UNUSED = (0.6, 0.6, 0.6)
_LINES: dict[str, dict[str, Any]] = {
    DIRECT: {"color": "#3c3c3c", "linestyle": "-", "linewidth": 1.0},
    SKIP: {"color": "#4a86c5", "linestyle": "-", "linewidth": 0.9},
    AGAIN: {"color": "#c8641e", "linestyle": (0, (4, 2)), "linewidth": 1.1},
}


def paths(save_path: str | os.PathLike[str] | None) -> list[str]:
    """The files to write. Raises ValueError and FileNotFoundError where they cannot be."""
    path = DEFAULT_PATH if save_path is None else os.fspath(save_path)
    suffix = os.path.splitext(path)[1]
    if suffix and suffix.lower() not in SUFFIXES:
        raise ValueError(
            f"save_path {path!r} must end in .svg or .png, or have no suffix, for both files"
        )
    directory = os.path.dirname(path) or "."
    if not os.path.isdir(directory):
        raise FileNotFoundError(f"save_path {path!r}: there is no directory {directory!r}")
    return [path] if suffix else [path + suffix for suffix in SUFFIXES]


def draw(
    graph: networkx.DiGraph,
    layer_info: Mapping[str, Mapping[str, Any]],
    title: str,
    paths: Iterable[str],
) -> None:
    """Write the drawing to each of the paths, in the format of its suffix.

    Raises ImportError, saying what to install, where matplotlib is missing.
    """
    try:
        import matplotlib
    except ImportError:
        raise ImportError(
            "visualize_graph needs matplotlib: pip install 'pccheck_ext[plot]'"
        ) from None
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # whatever style the program has set for its own plots
        matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "pccheck_ext"})
        drawn = figure(graph, layer_info, title)
        for path in paths:
            # Without the date the same graph gives the same file.
            metadata = {"Date": None} if path.lower().endswith(".svg") else {}
            drawn.savefig(path, metadata=metadata)


def figure(
    graph: networkx.DiGraph, layer_info: Mapping[str, Mapping[str, Any]], title: str
) -> Figure:
    """The drawing, which is yet to be written to a file."""
    from matplotlib.figure import Figure

    sheet = _sheet.arrange(graph, layer_info, title, _width_of)
    width, height = sheet.size
    drawn = Figure(figsize=(width, height), dpi=resolution(width, height))
    axes = drawn.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.set_axis_off()
    for note in sheet.notes:
        _draw_note(axes, note)
    for arc in sheet.arcs:
        _draw_arc(axes, sheet, arc)
    deepest = max((box.depth for box in sheet.boxes), default=0)
    for box in sheet.boxes:
        _draw_box(axes, sheet, box, _colour(box.depth, deepest) if box.used else _UNUSED)
    return drawn


def resolution(width: float, height: float) -> float:
    """Dots per inch: that of a screen, or what keeps the picture in 256 MB of memory."""
    return min(_DPI, math.sqrt(_MOST_PIXELS / (width * height)))


def _width_of(text: str, size_pt: float, bold: bool) -> float:
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    font = FontProperties(size=size_pt, weight="bold" if bold else "normal")
    width_pt, _, _ = text_to_path.get_text_width_height_descent(text, font, ismath=False)
    return float(width_pt) / 72


def _colour(depth: int, deepest: int) -> tuple[float, float, float]:
    import matplotlib

    red, green, blue, _ = matplotlib.colormaps["viridis"](1 - depth / max(deepest, 1))
    return red, green, blue


def _text(axes: Axes, x: float, y: float, text: str, size_pt: float, **settings: Any) -> None:
    # A layer's name may hold what TeX would understand.
    settings = {"color": _INK, "verticalalignment": "center", "parse_math": False, **settings}
    axes.text(x, y, text, fontsize=size_pt, **settings)


def _draw_box(
    axes: Axes, sheet: _sheet.Sheet, box: Box, colour: tuple[float, float, float]
) -> None:
    from matplotlib.patches import Rectangle

    left, upper = sheet.corner(box.number)
    pale = tuple(1 - 0.16 * (1 - part) for part in colour)
    axes.add_patch(Rectangle((left, upper), sheet.box_width, BOX, facecolor=pale, linewidth=0))
    axes.add_patch(Rectangle((left, upper), STRIP, BOX, facecolor=colour, linewidth=0))
    outline: dict[str, Any] = {"fill": False, "edgecolor": _FAINT, "linewidth": 0.6}
    axes.add_patch(Rectangle((left, upper), sheet.box_width, BOX, **outline))
    number_end = left + STRIP + sheet.number_width
    text_start = number_end + PADDING
    first, second = upper + 0.32 * BOX, upper + 0.74 * BOX
    settings: dict[str, Any] = {"weight": "bold", "horizontalalignment": "right"}
    _text(axes, number_end, first, str(box.number), _sheet.NAME_PT, **settings)
    _text(axes, text_start, first, box.name, _sheet.NAME_PT)
    _text(axes, text_start, second, box.detail, _sheet.DETAIL_PT, color=_FAINT)
    settings = {"color": _LINES[SKIP]["color"], "horizontalalignment": "right"}
    right = left + sheet.box_width - PADDING
    _text(axes, right, second, box.tags, _sheet.DETAIL_PT, **settings)


def _draw_arc(axes: Axes, sheet: _sheet.Sheet, arc: Arc) -> None:
    upper, lower = sorted(arc.connection[:2])
    left, top = sheet.corner(upper)
    _, bottom = sheet.corner(lower)
    if arc.lane is None:
        middle = left + sheet.box_width / 2
        _arrow(axes, [(middle, top + BOX), (middle, bottom)], arc.connection.kind)
        return
    beside = left - (arc.lane + 1) * LANE
    start, end = top + BOX / 2 + _PORT, bottom + BOX / 2 - _PORT
    points = [(left, start), (beside, start), (beside, end), (left, end)]
    downward = arc.connection.consumer < arc.connection.producer
    _arrow(axes, points if downward else points[::-1], arc.connection.kind)


def _arrow(axes: Axes, points: list[tuple[float, float]], kind: str) -> None:
    from matplotlib.patches import FancyArrowPatch
    from matplotlib.path import Path

    axes.add_patch(
        FancyArrowPatch(
            path=Path(points),
            arrowstyle="-|>,head_width=2.2,head_length=4",
            joinstyle="round",
            shrinkA=0,
            shrinkB=0,
            **_LINES[kind],
        )
    )


def _draw_note(axes: Axes, note: _sheet.Note) -> None:
    from matplotlib.patches import Rectangle

    size_pt = _sheet.TITLE_PT if note.is_title else _sheet.NOTE_PT
    weight = "bold" if note.is_title else "normal"
    _text(axes, note.left, note.middle, note.text, size_pt, weight=weight)
    start, end = note.left - _sheet.SAMPLE, note.left - PADDING
    if note.sample == COLOURS:
        steps = 12
        width = (end - start) / steps
        for i in range(steps):
            corner = start + i * width, note.middle - 0.06
            colour = _colour(i, steps - 1)
            axes.add_patch(Rectangle(corner, width, 0.12, facecolor=colour, linewidth=0))
    elif note.sample is not None:
        _arrow(axes, [(start, note.middle), (end, note.middle)], note.sample)
