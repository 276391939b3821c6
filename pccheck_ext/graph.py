"""DependencyGraphBuilder: which layer follows which, and so the order in which to update them.

The backward pass finishes a layer's gradient once it has passed the layer's first use in forward.
So layers are updated, and saved, from the model's end to its beginning.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pccheck_ext._fake import FirstForward, Inputs, capture_first_forward
from pccheck_ext._flow import DataFlow, record_data_flow
from pccheck_ext._sheet import size_text
from pccheck_ext.layers import (
    ROOT_LAYER,
    GradientOrder,
    group_parameters_by_layer,
    plain_name,
    unwrap,
)

if TYPE_CHECKING:
    import networkx

__all__ = ["DependencyGraphBuilder", "capture_first_forward"]

DATA_FLOW, GRADIENTS, REGISTRATION = "data flow", "gradients", "registration"

_MB = 1 << 20
_SHOWN = 4  # layers named at either end of a summary


class DependencyGraphBuilder:
    """The layers of `model` and their order: from its data flow where that can be traced.

    A layer is a module that owns parameters, named as in ``named_modules()`` without the wrappers
    of torch.compile and DistributedDataParallel. A parameter that several modules share belongs to
    the first; those that the outermost module owns itself form the layer ``(root)``.

    With `example_inputs`, one forward pass is traced over copies without data: no kernel runs, no
    memory is taken for them, and parameters, buffers, modes, hooks and generators stay as they are.
    A model that cannot be traced is no error: `order_source` and `order_reason` tell.

    Args:
        model: Layers are taken as they are now.
        verbose: Print a summary when the graph is built.
        example_inputs: What forward is called with: a tensor, a tuple of arguments, a mapping of
            keyword arguments, or a pair (tuple, mapping) of both. Or what `capture_first_forward`
            returned. Only shapes and dtypes matter.
        gradient_order: Watches backward passes; used where there is no data flow.
        trace_limit_s: Seconds after which tracing is given up.

    Attributes:
        layer_info: For each layer ``param_count``, ``total_size_bytes``, ``total_size_mb`` (of
            2**20 bytes, as everywhere in this package), ``trainable_count``, ``module`` (its
            type's name), and, for each parameter, ``names``, ``shapes`` and ``dtypes``.

    Raises:
        TypeError: `model` is no module, or `example_inputs` none of the above.
        ValueError: parameters of a lazy module have no shape yet, `gradient_order` watches layers
            of another model, or `trace_limit_s` is not positive.
    """

    def __init__(
        self,
        model: nn.Module,
        verbose: bool = False,
        *,
        example_inputs: Any = None,
        gradient_order: GradientOrder | None = None,
        trace_limit_s: float = 60.0,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__qualname__}")
        if not trace_limit_s > 0:
            raise ValueError(f"trace_limit_s must be positive, not {trace_limit_s!r}")
        self.model = model
        self.verbose = verbose
        self.gradient_order = gradient_order
        self.trace_limit_s = trace_limit_s
        self._example_inputs = _checked(example_inputs)
        self._layers = group_parameters_by_layer(model)
        if gradient_order and set(gradient_order.update_order()) != set(self._layers):
            raise ValueError("gradient_order watches other layers than model has")
        self.layer_info = _layer_info(model, self._layers)
        self._traced: DataFlow | str | None = None  # a string: why it failed
        self._graph: networkx.DiGraph | None = None

    def group_parameters_by_layer(self) -> dict[str, list[nn.Parameter]]:
        """Layer name -> its parameters, both in registration order."""
        return {layer: list(parameters) for layer, parameters in self._layers.items()}

    def observe_gradients(self) -> GradientOrder:
        """Watch the backward passes to come; ``close()`` what is returned after one.

        Used by the next `build_dependency_graph` where the data flow cannot be traced.
        """
        self.gradient_order = GradientOrder(self._layers)
        self._graph = None
        return self.gradient_order

    @property
    def order_source(self) -> str:
        """What the order is from: ``"data flow"``, ``"gradients"`` or ``"registration"``."""
        return str(self._built().graph["order_source"])

    @property
    def order_reason(self) -> str:
        """One sentence: why the order is from there, and not from the data flow if it is not."""
        return str(self._built().graph["order_reason"])

    def get_update_order(self) -> list[str]:
        """Every layer once, the model's last first; those that the trace does not use at the end.

        This is the order in which backward finishes gradients: by the first use in forward, the
        latest first. So a layer comes before those whose output it works on, but for one that is
        used again later (a tied weight, a module called twice), which comes where it was used
        first. Builds the graph if that has not been done.
        """
        return list(self._built())

    def build_dependency_graph(self) -> networkx.DiGraph:
        """A graph with an edge from each layer to those whose output it works on.

        Nodes are in update order, with ``order`` (from 1), ``depth`` (edges on the longest path
        that leads to the node: of one depth, none works on what another has computed) and what
        `layer_info` tells as ``param_count`` and ``size_bytes``; ``used`` is False for layers that
        the trace does not use. An edge with ``again=True`` is one against the order: it leads from
        a layer that is used again to what it then works on. Where the data flow is not known the
        graph is a chain in update order. ``graph.graph`` has ``order_source`` and ``order_reason``.

        Traced once; the order is determined anew at each call, from gradients seen by then.
        """
        flow = self._trace()
        graph = self._graph_of(flow) if isinstance(flow, DataFlow) else self._chain(flow)
        _number(graph)
        self._graph = graph
        if self.verbose:
            print(self._summary(graph))
        return graph.copy()

    def visualize_graph(self, save_path: str | None = None) -> None:
        """Draw the graph as an SVG or PNG file, by the suffix of `save_path`; without one, as both.

        None stands for ``dependency_graph`` in the working directory. Needs matplotlib, from the
        extra ``plot``, and no display. Raises ImportError where it is missing, ValueError for other
        suffixes, FileNotFoundError where the directory is not there; nothing has been written then.
        """
        from pccheck_ext import _draw

        paths = _draw.paths(save_path)
        _draw.draw(self._built(), self.layer_info, type(unwrap(self.model)).__name__, paths)
        if self.verbose:
            print(f"pccheck_ext: drew {' and '.join(paths)}")

    def _built(self) -> networkx.DiGraph:
        return self._graph if self._graph is not None else self.build_dependency_graph()

    def _trace(self) -> DataFlow | str:
        """Or why there is none."""
        inputs = _inputs(self._example_inputs)
        if self._traced is None and isinstance(inputs, Inputs):
            self._traced = record_data_flow(
                unwrap(self.model), self._layers, inputs, limit_s=self.trace_limit_s
            )
        return self._traced or str(inputs)

    def _graph_of(self, flow: DataFlow) -> networkx.DiGraph:
        order = _order(flow, list(self._layers))
        unused = len(self._layers) - len(flow.first_use)
        reason = "a forward pass was traced"
        if unused:
            reason += f"; {unused} of {len(self._layers)} layers, which it does not use, come last"
        graph = self._nodes(order, DATA_FLOW, reason)
        graph.add_edges_from(flow.edges)
        for layer in graph:
            graph.nodes[layer]["used"] = layer in flow.first_use
        return graph

    def _chain(self, why_not_traced: str) -> networkx.DiGraph:
        watched = self.gradient_order
        if watched is not None and watched.source == GRADIENTS:
            order, source = watched.update_order(), GRADIENTS
            reason = f"a backward pass was observed; {why_not_traced}"
        else:
            order, source = list(reversed(self._layers)), REGISTRATION
            reason = f"no backward pass was observed; {why_not_traced}"
        graph = self._nodes(order, source, reason)
        graph.add_edges_from(itertools.pairwise(order))
        return graph

    def _nodes(self, order: list[str], source: str, reason: str) -> networkx.DiGraph:
        import networkx

        graph = networkx.DiGraph(order_source=source, order_reason=reason)
        for number, layer in enumerate(order, start=1):
            info = self.layer_info[layer]
            graph.add_node(
                layer,
                order=number,
                param_count=info["param_count"],
                size_bytes=info["total_size_bytes"],
                used=True,
            )
        return graph

    def _summary(self, graph: networkx.DiGraph) -> str:
        names = list(graph)
        if len(names) > 2 * _SHOWN + 1:
            between = f"({len(names) - 2 * _SHOWN} more)"
            names = [*names[:_SHOWN], between, *names[-_SHOWN:]]
        count = sum(info["param_count"] for info in self.layer_info.values())
        size = size_text(sum(info["total_size_bytes"] for info in self.layer_info.values()))
        return (
            f"pccheck_ext: {len(graph)} layers, {count:,} parameters, {size}\n"
            f"  update order from {graph.graph['order_source']}: {graph.graph['order_reason']}\n"
            f"  {' > '.join(names)}"
        )


def _checked(given: Any) -> Inputs | FirstForward | None:
    """`example_inputs`, in one form."""
    if given is None or isinstance(given, (FirstForward, Inputs)):
        return given
    if isinstance(given, torch.Tensor):
        return Inputs((given,), {})
    if isinstance(given, Mapping):
        return Inputs((), dict(given))
    if isinstance(given, tuple):
        if len(given) == 2 and isinstance(given[0], tuple) and isinstance(given[1], Mapping):
            return Inputs(given[0], dict(given[1]))
        return Inputs(given, {})
    raise TypeError(
        "example_inputs must be a tensor, a tuple of arguments, a mapping of keyword arguments, or "
        f"a pair of such a tuple and mapping; got {type(given).__qualname__}"
    )


def _inputs(given: Inputs | FirstForward | None) -> Inputs | str:
    """What there is to trace with by now, or why there is nothing."""
    if given is None:
        return "no example inputs were given to trace with"
    if isinstance(given, Inputs):
        return given
    if given.failure is not None:
        return f"the first forward pass's inputs were not understood: {given.failure}"
    return given.inputs or "no forward pass has been seen whose inputs to trace with"


def _layer_info(
    model: nn.Module, layers: Mapping[str, list[nn.Parameter]]
) -> dict[str, dict[str, Any]]:
    names = {id(p): plain_name(name) for name, p in unwrap(model).named_parameters()}
    modules = {plain_name(f"{name}."): module for name, module in unwrap(model).named_modules()}
    info = {}
    for layer, parameters in layers.items():
        for parameter in parameters:
            if isinstance(parameter, nn.parameter.UninitializedParameter):
                raise ValueError(
                    f"{names[id(parameter)]} has no shape yet: run a forward pass of the lazy "
                    "module first"
                )
        size_bytes = sum(p.numel() * p.element_size() for p in parameters)
        info[layer] = {
            "param_count": sum(p.numel() for p in parameters),
            "total_size_bytes": size_bytes,
            "total_size_mb": size_bytes / _MB,
            "trainable_count": sum(p.numel() for p in parameters if p.requires_grad),
            "module": type(modules["." if layer == ROOT_LAYER else f"{layer}."]).__name__,
            "names": [names[id(p)] for p in parameters],
            "shapes": [list(p.shape) for p in parameters],
            "dtypes": [str(p.dtype).removeprefix("torch.") for p in parameters],
        }
    return info


def _order(flow: DataFlow, registered: list[str]) -> list[str]:
    """As gradients become ready: backward ends with a layer where forward began with it."""
    position = {layer: i for i, layer in enumerate(registered)}

    def forward(layer: str) -> tuple[int, int]:
        return flow.first_use.get(layer, -1), position[layer]

    return sorted(registered, key=forward, reverse=True)


def _number(graph: networkx.DiGraph) -> None:
    """Tells edges against the order, and each node's depth by the others."""
    order = graph.nodes("order")
    for consumer, producer, edge in graph.edges(data=True):
        edge["again"] = order[consumer] > order[producer]
    for layer in graph:
        later = set(graph.predecessors(layer))
        # What works on a layer's second use comes after what this use works on.
        for consumer in [c for c in later if order[c] > order[layer]]:
            later.update(graph.predecessors(consumer))
        depths = [graph.nodes[c]["depth"] for c in later if order[c] < order[layer]]
        graph.nodes[layer]["depth"] = 1 + max(depths, default=-1)
