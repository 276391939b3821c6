"""The update order of a trainer's model, found once forward and backward have been seen."""

from __future__ import annotations

from typing import Any

from torch import nn

from pccheck_ext._fake import FirstForward
from pccheck_ext.graph import DependencyGraphBuilder, capture_first_forward
from pccheck_ext.layers import GradientOrder, group_parameters_by_layer

__all__ = ["OrderWatch"]

_TRACE_LIMIT_S = 20.0


class OrderWatch:
    """Watches the first passes of `model`, unless `example_inputs` tell what forward takes."""

    def __init__(self, model: nn.Module, example_inputs: Any, verbose: bool) -> None:
        self._model = model
        self._verbose = verbose
        self._inputs = capture_first_forward(model) if example_inputs is None else example_inputs
        # Looks at the arguments now, while there is a caller to be told of them.
        DependencyGraphBuilder(model, example_inputs=self._inputs)
        self._gradients = GradientOrder(group_parameters_by_layer(model))

    def stop(self) -> None:
        """A whole step has been seen, which is enough."""
        self._gradients.close()

    def settle(self) -> DependencyGraphBuilder:
        """A builder that has found out the order by what was seen; ends the watching."""
        self._gradients.close()
        builder = DependencyGraphBuilder(
            self._model,
            self._verbose,
            example_inputs=self._inputs,
            gradient_order=self._gradients,
            trace_limit_s=_TRACE_LIMIT_S,
        )
        builder.build_dependency_graph()
        return builder

    def close(self) -> None:
        self._gradients.close()
        if isinstance(self._inputs, FirstForward):
            self._inputs.close()
