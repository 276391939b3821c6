"""Where everything goes in a drawing of a layer graph; draws nothing itself.

Boxes stand in columns in update order. What connects two that follow each other is an arrow between
them; other connections within a column are arcs in lanes to the left of it; those that lead to
another column, or find no lane, are tags in the box: "→ 39". All lengths are inches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import networkx

__all__ = ["Arc", "Box", "Connection", "Sheet", "arrange", "choose", "size_text"]

NAME_PT, DETAIL_PT = 9.0, 7.5
BOX, GAP = 0.42, 0.16  # heights of a box and of what is between two
ROW = BOX + GAP
STRIP, PADDING = 0.1, 0.1  # in a box: its coloured edge, and around text
LANE, BETWEEN, MARGIN = 0.11, 0.4, 0.35
TITLE_PT, NOTE_PT, LINE, SAMPLE = 13.0, 8.5, 0.21, 0.5  # of the header; a sample is before its text
NARROWEST, LOW = 7.0, 12.0  # columns up to that height are not divided
MOST_LANES = 16
LONGEST_NAME, LONGEST_TITLE = 72, 48

DIRECT, SKIP, AGAIN, COLOURS = "direct", "skip", "again", "colours"

WidthOf = Callable[[str, float, bool], float]
"""Measures a text of a size in points, bold or not."""


class Connection(NamedTuple):
    consumer: int  # numbers in update order, from 1
    producer: int
    kind: str


@dataclass(frozen=True)
class Arc:
    connection: Connection
    lane: int | None  # None: an arrow from one box to the next


@dataclass(frozen=True)
class Box:
    number: int
    name: str
    detail: str
    tags: str
    depth: int
    used: bool


class Note(NamedTuple):
    """A text of the header, by its left end and its middle; `sample` is drawn before it."""

    left: float
    middle: float
    text: str
    sample: str | None = None
    is_title: bool = False


@dataclass(frozen=True)
class Sheet:
    notes: list[Note]
    header: float  # its height
    boxes: list[Box]
    arcs: list[Arc]
    rows: int  # of a column
    box_width: float
    number_width: float

    @property
    def lanes(self) -> int:
        return max((arc.lane + 1 for arc in self.arcs if arc.lane is not None), default=0)

    @property
    def column_width(self) -> float:
        return self.lanes * LANE + self.box_width + BETWEEN

    @property
    def size(self) -> tuple[float, float]:
        """Width and height."""
        columns = math.ceil(len(self.boxes) / self.rows)
        width = 2 * MARGIN + columns * self.column_width - BETWEEN
        return max(width, NARROWEST), 2 * MARGIN + self.header + self.rows * ROW - GAP

    def corner(self, number: int) -> tuple[float, float]:
        """Of a box: left and upper."""
        column, row = divmod(number - 1, self.rows)
        left = MARGIN + column * self.column_width + self.lanes * LANE
        return left, MARGIN + self.header + row * ROW


def choose(graph: networkx.DiGraph) -> tuple[list[Connection], dict[int, int]]:
    """The connections to draw, and for each consumer how many of its others are not.

    Drawn are those that no path over other layers stands for, and of the others, which skip layers,
    the shortest of each consumer: where residuals add up, every layer is connected with all before.
    """
    producers: dict[int, list[int]] = {number: [] for number in range(1, len(graph) + 1)}
    again: dict[int, list[int]] = {number: [] for number in producers}
    order = graph.nodes(data="order")
    for consumer, producer, against in graph.edges(data="again"):
        (again if against else producers)[order[consumer]].append(order[producer])
    drawn: list[Connection] = []
    hidden: dict[int, int] = {}
    reached = dict.fromkeys(producers, 0)  # bit n: a path leads to number n
    for number in reversed(producers):
        skips = []
        for producer in sorted(producers[number]):
            if reached[number] >> producer & 1:
                skips.append(producer)
            else:
                drawn.append(Connection(number, producer, DIRECT))
            reached[number] |= reached[producer] | 1 << producer
        returns = sorted(again[number])
        drawn += [Connection(number, producer, SKIP) for producer in skips[:1]]
        drawn += [Connection(number, producer, AGAIN) for producer in returns[:1]]
        hidden[number] = len(skips[1:]) + len(returns[1:])
    return sorted(drawn), hidden


def arrange(
    graph: networkx.DiGraph,
    layer_info: Mapping[str, Mapping[str, Any]],
    title: str,
    width_of: WidthOf,
) -> Sheet:
    """Place everything. Boxes are as wide as the longest text needs, so that none overlaps."""
    connections, hidden = choose(graph)
    number_width = width_of("0" * len(str(len(graph))), NAME_PT, True) + PADDING
    texts = {layer: (shortened(layer), _detail(layer_info[layer])) for layer in graph}
    # How many rows a column has depends on its width, but for the tags, and they on the rows.
    widths = [_text_width(*both, "", number_width, width_of) for both in texts.values()]
    rows = _rows(len(graph), max(widths, default=0.0) + BETWEEN)
    arcs, tags = _lanes(connections, rows)
    boxes = []
    for layer, node in graph.nodes(data=True):
        number = node["order"]
        own = tags.get(number, []) + ([f"+{hidden[number]}"] if hidden[number] else [])
        boxes.append(Box(number, *texts[layer], "  ".join(own), node["depth"], node["used"]))
    widths = [_text_width(b.name, b.detail, b.tags, number_width, width_of) for b in boxes]
    box_width = STRIP + 3 * PADDING + max(widths, default=0.0)
    bare = Sheet([], 0.0, boxes, arcs, rows, box_width, number_width)
    notes = _header(graph, title, bare, width_of)
    return replace(bare, notes=notes, header=notes[-1].middle - MARGIN + 1.5 * LINE)


def _header(graph: networkx.DiGraph, title: str, sheet: Sheet, width_of: WidthOf) -> list[Note]:
    count = sum(number for _, number in graph.nodes(data="param_count"))
    size = size_text(sum(size for _, size in graph.nodes(data="size_bytes")))
    told = graph.graph
    room = sheet.size[0] - 2 * MARGIN
    lines = [
        f"{len(graph)} layers, {count:,} parameters, {size}; numbers: the order of their update",
        f"Order from {told['order_source']}: {told['order_reason']}",
    ]
    lines = [part for line in lines for part in _wrapped(line, room, width_of)]
    notes = [Note(MARGIN, MARGIN + 0.1, shortened(title, LONGEST_TITLE), is_title=True)]
    below = MARGIN + 0.14 + LINE
    notes += [Note(MARGIN, below + i * LINE, line) for i, line in enumerate(lines)]

    left, middle = MARGIN, below + (len(lines) + 0.4) * LINE
    for sample, text in _legend(sheet, told["order_source"] == "data flow"):
        start = left + (SAMPLE if sample else 0.0)
        if left > MARGIN and start + width_of(text, NOTE_PT, False) > MARGIN + room:
            start += MARGIN - left
            middle += LINE
        notes.append(Note(start, middle, text, sample))
        left = start + width_of(text, NOTE_PT, False) + 0.3
    return notes


def _legend(sheet: Sheet, flow_is_known: bool) -> list[tuple[str | None, str]]:
    """Explains what is on the sheet, and nothing else."""
    kinds = {arc.connection.kind for arc in sheet.arcs}
    tags = " ".join(box.tags for box in sheet.boxes)
    follows = "works on the output of" if flow_is_known else "is updated before"
    samples: dict[str | None, str] = {
        DIRECT: follows,
        SKIP: "likewise, past layers in between",
        AGAIN: "likewise, being used again",
    }
    signs = {
        "→": f"→ 9: {follows} 9",
        "↺": "↺ 9: likewise, being used again",
        "+": "+1: one connection more",
    }
    colours = "updated first to last" + "; of one colour: side by side" * flow_is_known
    return [
        (COLOURS, colours),
        *((kind, text) for kind, text in samples.items() if kind in kinds),
        *((None, text) for sign, text in signs.items() if sign in tags),
    ]


def _wrapped(text: str, room: float, width_of: WidthOf) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".lstrip()
        if lines[-1] and width_of(longer, NOTE_PT, False) > room:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def _text_width(name: str, detail: str, tags: str, number_width: float, width_of: WidthOf) -> float:
    below = f"{detail}     {tags}" if tags else detail
    return number_width + max(width_of(name, NAME_PT, False), width_of(below, DETAIL_PT, False))


def _rows(count: int, column_width: float) -> int:
    """Of a column: the sheet grows in both directions, a little more in height."""
    columns = 1
    while (rows := math.ceil(count / columns)) * ROW > max(LOW, 1.3 * columns * column_width):
        columns += 1
    return max(rows, 1)


def _lanes(connections: Sequence[Connection], rows: int) -> tuple[list[Arc], dict[int, list[str]]]:
    """Arcs, the shortest nearest to the boxes, and the tags of each consumer."""
    arcs: list[Arc] = []
    tags: dict[int, list[str]] = {}
    taken: dict[tuple[int, int], list[tuple[int, int]]] = {}  # column, lane -> from where to where
    for connection in sorted(connections, key=lambda c: (abs(c.producer - c.consumer), c)):
        upper, lower = sorted(connection[:2])
        column = (upper - 1) // rows
        if column != (lower - 1) // rows:
            lane = None
        elif lower == upper + 1 and connection.kind == DIRECT:
            arcs.append(Arc(connection, None))
            continue
        else:
            free = (
                lane
                for lane in range(MOST_LANES)
                if all(a >= lower or b <= upper for a, b in taken.get((column, lane), ()))
            )
            lane = next(free, None)
        if lane is None:
            sign = "↺" if connection.kind == AGAIN else "→"
            tags.setdefault(connection.consumer, []).append(f"{sign} {connection.producer}")
        else:
            taken.setdefault((column, lane), []).append((upper, lower))
            arcs.append(Arc(connection, lane))
    return arcs, tags


def _detail(info: Mapping[str, Any]) -> str:
    size = size_text(info["total_size_bytes"])
    return f"{info['module']}   {info['param_count']:,} parameters   {size}"


def shortened(name: str, most: int = LONGEST_NAME) -> str:
    """At most `most` characters, an even number: the first and the last."""
    return name if len(name) <= most else f"{name[: most // 2 - 1]}…{name[-(most // 2) :]}"


def size_text(size_bytes: int) -> str:
    """1536 -> "1.5 kB"; units of 2**10."""
    for unit, one in (("GB", 1 << 30), ("MB", 1 << 20), ("kB", 1 << 10)):
        if size_bytes >= one:
            return f"{size_bytes / one:,.1f} {unit}"
    return f"{size_bytes} B"
