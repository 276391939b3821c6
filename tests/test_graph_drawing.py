"""Drawings of layer graphs: readable, complete, and written only where they were asked for."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import matplotlib
import networkx
import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.image import imread
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from torch import nn

from pccheck_ext import DependencyGraphBuilder, _draw, _sheet
from pccheck_ext._sheet import Connection


def builder_of(layers: int, names: str = "block_$x$.{}.dense") -> DependencyGraphBuilder:
    """A chain of so many layers, in which every second one is skipped, too."""

    class Blocks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for i in range(layers):
                owner: nn.Module = self
                *path, last = names.format(i).split(".")
                for part in path:
                    if part not in owner._modules:
                        owner.add_module(part, nn.Module())
                    owner = owner.get_submodule(part)
                owner.add_module(last, nn.Linear(4, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for i in range(layers):
                x = self.get_submodule(names.format(i))(x) + (x if i % 2 else 0)
            return x

    return DependencyGraphBuilder(Blocks(), example_inputs=torch.ones(1, 4))


def texts_of(svg: Path) -> list[str]:
    found = ET.parse(svg).getroot().iter("{http://www.w3.org/2000/svg}text")
    return [element.text or "" for element in found]


def graph_of(layers: int, *edges: tuple[int, int]) -> networkx.DiGraph:
    """Layers 1 to so many, in order; edges by number."""
    graph = networkx.DiGraph(order_source="data flow", order_reason="by hand")
    for number in range(1, layers + 1):
        graph.add_node(str(number), order=number, depth=number, used=True)
    for consumer, producer in edges:
        graph.add_edge(str(consumer), str(producer), again=consumer > producer)
    return graph


# --- Files ---------------------------------------------------------------------------------------


def test_without_a_suffix_both_kinds_are_written(tmp_path: Path) -> None:
    builder_of(2).visualize_graph(str(tmp_path / "graph"))
    assert sorted(os.listdir(tmp_path)) == ["graph.png", "graph.svg"]
    assert ET.parse(tmp_path / "graph.svg").getroot().tag.endswith("svg")
    assert imread(tmp_path / "graph.png").shape[2] == 4


@pytest.mark.parametrize("name", ["graph.svg", "graph.png", "graph.PNG"])
def test_the_suffix_says_what_is_written(name: str, tmp_path: Path) -> None:
    builder_of(2).visualize_graph(str(tmp_path / name))
    assert os.listdir(tmp_path) == [name]
    start = (tmp_path / name).read_bytes()[:4]
    assert start == (b"<?xm" if name.endswith("svg") else b"\x89PNG")


def test_without_a_path_it_is_drawn_into_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    builder_of(1).visualize_graph()
    assert sorted(os.listdir()) == ["dependency_graph.png", "dependency_graph.svg"]


def test_paths_that_cannot_be_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    builder = builder_of(1)
    with pytest.raises(ValueError, match=r"must end in \.svg or \.png"):
        builder.visualize_graph(str(tmp_path / "graph.pdf"))
    with pytest.raises(FileNotFoundError, match="there is no directory"):
        builder.visualize_graph(str(tmp_path / "absent" / "graph.svg"))
    assert not os.listdir(tmp_path)


def test_without_matplotlib_one_sentence_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"needs matplotlib: pip install 'pccheck_ext\[plot\]'$"):
        builder_of(1).visualize_graph(str(tmp_path / "graph"))
    assert not os.listdir(tmp_path)


def test_the_same_model_gives_the_same_files(tmp_path: Path) -> None:
    for name in ("one", "other"):
        builder_of(5).visualize_graph(str(tmp_path / name))
    for suffix in (".svg", ".png"):
        one, other = (tmp_path / f"{name}{suffix}" for name in ("one", "other"))
        assert one.read_bytes() == other.read_bytes()


def test_the_programs_own_plots_are_left_alone(tmp_path: Path) -> None:
    script = (
        "import sys, matplotlib, torch, pccheck_ext\n"
        "assert 'networkx' not in sys.modules\n"
        "matplotlib.rcParams['figure.facecolor'] = 'black'\n"
        "before = dict(matplotlib.rcParams)\n"
        "pccheck_ext.DependencyGraphBuilder(torch.nn.Linear(1, 1)).visualize_graph(sys.argv[1])\n"
        "assert dict(matplotlib.rcParams) == before\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    bare = {name: value for name, value in os.environ.items() if name != "DISPLAY"}
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "graph")],
        env={**bare, "MPLBACKEND": "tkagg"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    corner = imread(tmp_path / "graph.png")[0, 0]
    assert corner.tolist() == [1, 1, 1, 1]


def test_verbose_tells_what_was_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    builder = builder_of(1)
    builder.verbose = True
    path = str(tmp_path / "graph.svg")
    builder.visualize_graph(path)
    assert capsys.readouterr().out.endswith(f"pccheck_ext: drew {path}\n")


# --- What is to be read --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large() -> DependencyGraphBuilder:
    return builder_of(150)


def test_every_layers_name_number_and_size_stand_there_as_text(
    large: DependencyGraphBuilder, tmp_path: Path
) -> None:
    large.visualize_graph(str(tmp_path / "graph.svg"))
    texts = texts_of(tmp_path / "graph.svg")
    assert texts[0] == "Blocks"
    assert "150 layers, 3,000 parameters, 11.7 kB; numbers: the order of their update" in texts
    assert "Order from data flow: a forward pass was traced" in texts
    for number, layer in enumerate(large.get_update_order(), start=1):
        place = texts.index(layer)
        assert texts[place - 1] == str(number)
        assert texts[place + 1] == "Linear   20 parameters   80 B"


def drawn_texts(builder: DependencyGraphBuilder) -> tuple[list[tuple[Text, Bbox]], Bbox]:
    """Each with its extent, and the extent of all."""
    graph = builder.build_dependency_graph()
    figure = _draw.figure(graph, builder.layer_info, type(builder.model).__name__)
    renderer = FigureCanvasAgg(figure).get_renderer()  # type: ignore[no-untyped-call]
    texts = [text for text in figure.axes[0].texts if text.get_text()]
    return [(text, text.get_window_extent(renderer)) for text in texts], figure.bbox


def assert_legible(builder: DependencyGraphBuilder) -> None:
    texts, sheet = drawn_texts(builder)
    for text, extent in texts:
        assert text.get_fontsize() >= 7
        inside = sheet.x0 < extent.x0 and extent.x1 < sheet.x1 and sheet.y0 < extent.y0
        assert inside, text.get_text()
    boxes = np.array([extent.extents for _, extent in texts])
    start = np.maximum(boxes[:, None, :2], boxes[None, :, :2])
    end = np.minimum(boxes[:, None, 2:], boxes[None, :, 2:])
    overlaps = np.argwhere(np.triu((start < end).all(axis=2), k=1))
    assert not len(overlaps), [(texts[i][0], texts[j][0]) for i, j in overlaps]


def test_no_text_of_150_layers_covers_another(large: DependencyGraphBuilder) -> None:
    assert_legible(large)


def test_neither_do_long_names_types_and_reasons() -> None:
    name = "a_module_with_a_name_that_does_not_end." * 3 + "{}"
    assert_legible(builder_of(7, name))
    kind = type("Layer" * 15, (nn.Linear,), {})
    model = type("Model" * 15, (nn.Sequential,), {})(kind(2, 2), Failing(), kind(2, 2))
    assert_legible(DependencyGraphBuilder(model, example_inputs=torch.ones(1, 2)))


class Failing(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("there are words enough to fill a line and more than that " * 4)


def test_long_names_keep_their_ends() -> None:
    assert _sheet.shortened("a" * 72) == "a" * 72
    assert _sheet.shortened("a" * 50 + "b" * 50) == "a" * 35 + "…" + "b" * 36


def test_boxes_overlap_neither_each_other_nor_the_header(large: DependencyGraphBuilder) -> None:
    graph = large.build_dependency_graph()
    sheet = _sheet.arrange(graph, large.layer_info, "Blocks", _draw._width_of)
    width, height = sheet.size
    corners = [sheet.corner(number) for number in range(1, 151)]
    for left, upper in corners:
        assert left + sheet.box_width < width
        assert sheet.header < upper < upper + _sheet.BOX < height
    for (left, upper), (right, lower) in itertools.combinations(corners, 2):
        apart = abs(left - right) > sheet.box_width or abs(upper - lower) > _sheet.BOX
        assert apart
    assert 0.5 < height / width < 2


def test_layers_side_by_side_have_one_colour_and_unused_ones_are_grey(tmp_path: Path) -> None:
    class Sides(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right, self.unused = (nn.Linear(2, 2) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.left(x) + self.right(x)

    builder = DependencyGraphBuilder(Sides(), example_inputs=torch.ones(1, 2))
    graph = builder.build_dependency_graph()
    figure = _draw.figure(graph, builder.layer_info, "Sides")
    strips = [
        patch.get_facecolor()[:3]
        for patch in figure.axes[0].patches
        if getattr(patch, "get_width", lambda: 0)() == _sheet.STRIP
    ]
    assert len(strips) == 3
    assert strips[0] == strips[1]
    assert strips[2] == (0.6, 0.6, 0.6)


def test_the_picture_of_a_very_large_model_is_bounded() -> None:
    graph = graph_of(20_000)
    for layer in graph:
        graph.nodes[layer].update(param_count=1, size_bytes=4)
    info: Any = {
        layer: {"module": "Linear", "param_count": 1, "total_size_bytes": 4} for layer in graph
    }
    sheet = _sheet.arrange(graph, info, "Large", lambda text, size, bold: len(text) * size / 120)
    width, height = sheet.size
    assert width * height * _draw.resolution(width, height) ** 2 <= 1.001 * (1 << 26)
    assert _draw.resolution(10, 10) == 120


def test_a_model_without_layers_can_be_drawn(tmp_path: Path) -> None:
    DependencyGraphBuilder(nn.ReLU()).visualize_graph(str(tmp_path / "graph.svg"))
    assert "0 layers, 0 parameters, 0 B" in texts_of(tmp_path / "graph.svg")[1]


# --- Connections ---------------------------------------------------------------------------------


def test_connections_that_no_path_stands_for_are_all_drawn() -> None:
    fan = graph_of(5, (1, 2), (1, 3), (1, 4), (2, 5), (3, 5), (4, 5))
    drawn, hidden = _sheet.choose(fan)
    assert {connection.kind for connection in drawn} == {"direct"}
    assert len(drawn) == 6
    assert not any(hidden.values())


def test_of_the_connections_past_layers_the_shortest_is_drawn_and_the_others_counted() -> None:
    residual = graph_of(5, *itertools.combinations(range(1, 6), 2))
    drawn, hidden = _sheet.choose(residual)
    assert [c for c in drawn if c.kind == "direct"] == [
        Connection(i, i + 1, "direct") for i in range(1, 5)
    ]
    assert [c for c in drawn if c.kind == "skip"] == [
        Connection(i, i + 2, "skip") for i in range(1, 4)
    ]
    assert hidden == {1: 2, 2: 1, 3: 0, 4: 0, 5: 0}


def test_a_second_use_is_drawn_as_such() -> None:
    drawn, hidden = _sheet.choose(graph_of(3, (1, 2), (2, 3), (3, 1), (3, 2)))
    assert Connection(3, 1, "again") in drawn
    assert hidden[3] == 1


def test_what_leads_to_another_column_or_finds_no_lane_is_told_in_the_box() -> None:
    connections = [
        Connection(1, 2, "direct"),
        Connection(1, 3, "direct"),
        Connection(2, 5, "direct"),
        Connection(4, 5, "direct"),
        Connection(6, 1, "again"),
    ]
    arcs, tags = _sheet._lanes(connections, rows=4)
    assert [(arc.connection[:2], arc.lane) for arc in arcs] == [((1, 2), None), ((1, 3), 0)]
    assert tags == {2: ["→ 5"], 4: ["→ 5"], 6: ["↺ 1"]}
    many = [Connection(i, 81 - i, "direct") for i in range(2, 41)]
    arcs, tags = _sheet._lanes(many, rows=100)
    assert len(arcs) == _sheet.MOST_LANES + 1  # that of two neighbours needs none
    assert len(tags) == 39 - len(arcs)


def test_arcs_in_one_lane_do_not_meet() -> None:
    connections = [Connection(a, b, "direct") for a, b in [(1, 4), (2, 6), (4, 6), (3, 5), (5, 9)]]
    arcs, _ = _sheet._lanes(connections, rows=10)
    assert len(arcs) == 5
    for one, other in itertools.combinations(arcs, 2):
        if one.lane == other.lane:
            (a, b), (c, d) = one.connection[:2], other.connection[:2]
            assert b <= c or d <= a


@pytest.mark.parametrize("known", [True, False])
def test_the_legend_explains_what_is_there_and_nothing_else(known: bool, tmp_path: Path) -> None:
    builder = builder_of(3)
    if not known:
        builder = DependencyGraphBuilder(builder.model)
    builder.visualize_graph(str(tmp_path / "graph.svg"))
    texts = texts_of(tmp_path / "graph.svg")
    assert ("works on the output of" in texts) == known
    assert ("is updated before" in texts) == (not known)
    assert ("likewise, past layers in between" in texts) == known
    assert "likewise, being used again" not in texts
    assert matplotlib.rcParams["svg.fonttype"] == "path"
