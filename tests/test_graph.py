"""Layers, the data flow between them, and the order of their update that follows."""

from __future__ import annotations

import functools
import itertools
import random
import types
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import networkx
import numpy as np
import pytest
import torch
import torch.distributed as dist
from _models import Zoo, assert_same, generators_kept
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

from pccheck_ext import (
    DependencyGraphBuilder,
    LayerwiseCheckpointTrainer,
    capture_first_forward,
)
from pccheck_ext._fake import Inputs
from pccheck_ext._flow import DataFlow, record_data_flow
from pccheck_ext.layers import GradientOrder, group_parameters_by_layer

# Such as that forward has kept tensors without data.
pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")

ROWS = torch.arange(12.0).reshape(3, 4) / 12


@pytest.fixture(autouse=True)
def _generators_of_other_tests() -> Iterator[None]:
    with generators_kept():
        torch.manual_seed(0)
        yield


def square() -> nn.Linear:
    return nn.Linear(4, 4)


class Counting(nn.Linear):
    """Knows how often it was called."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


class Model(nn.Module):
    """Layers a, b, c and d, and a forward given from outside."""

    def __init__(self, forward: Callable[..., Any], **more: Any) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = square(), square(), square(), square()
        self.shift = nn.Parameter(torch.zeros(4))
        for name, value in more.items():
            setattr(self, name, value)
        self._forward = forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._forward(self, *args, **kwargs)


def traced(model: nn.Module, inputs: Any = ROWS) -> DependencyGraphBuilder:
    builder = DependencyGraphBuilder(model, example_inputs=inputs)
    assert builder.order_source == "data flow", builder.order_reason
    return builder


def edges(model: nn.Module, inputs: Any = ROWS) -> set[tuple[str, str]]:
    return set(traced(model, inputs).build_dependency_graph().edges)


def order(forward: Callable[..., Any], **more: Any) -> list[str]:
    """Of those layers that are used."""
    graph = traced(Model(forward, **more)).build_dependency_graph()
    return [layer for layer, used in graph.nodes(data="used") if used]


# --- Layers --------------------------------------------------------------------------------------


def test_layers_are_the_modules_that_own_parameters_and_each_parameter_is_in_one() -> None:
    model = Zoo()
    layers = DependencyGraphBuilder(model).group_parameters_by_layer()
    assert list(layers) == [
        "(root)", "embed", "norm", "conv", "sometimes", "late", "frozen", "wide"
    ]  # fmt: skip
    listed = [parameter for own in layers.values() for parameter in own]
    assert len({id(parameter) for parameter in listed}) == len(listed)
    assert {id(parameter) for parameter in listed} == {id(p) for p in model.parameters()}
    assert layers["(root)"] == [model.scale]


def test_info_counts_parameters_and_bytes() -> None:
    model = nn.ModuleDict({"fc": nn.Linear(9, 10), "short": nn.Linear(2, 3).half()})
    model.short.weight.requires_grad_(False)
    info = DependencyGraphBuilder(model).layer_info
    assert info["fc"] == {
        "param_count": 100,
        "total_size_bytes": 400,
        "total_size_mb": 400 / 2**20,
        "trainable_count": 100,
        "module": "Linear",
        "names": ["fc.weight", "fc.bias"],
        "shapes": [[10, 9], [10]],
        "dtypes": ["float32", "float32"],
    }
    assert info["short"]["total_size_bytes"] == 18
    assert info["short"]["trainable_count"] == 3
    assert info["short"]["dtypes"] == ["float16", "float16"]


@pytest.fixture
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method.:DeprecationWarning")  # torch's own
def test_names_are_plain_inside_torch_compile_and_ddp(process_group: None) -> None:
    plain = nn.Sequential(square(), nn.Sequential(Counting(4, 4), nn.ReLU()))
    names = ["1.0", "0"]
    assert traced(plain).get_update_order() == names
    for wrapped in (
        torch.compile(plain, backend="eager"),
        nn.parallel.DistributedDataParallel(plain),
        nn.Sequential(plain[0], torch.compile(plain[1], backend="eager")),
        torch.compile(nn.Sequential(plain[0], torch.compile(plain[1], backend="eager"))),
    ):
        builder = traced(wrapped)
        assert builder.get_update_order() == names
        assert list(builder.layer_info) == names[::-1] == list(group_parameters_by_layer(wrapped))
        assert builder.layer_info["1.0"]["names"] == ["1.0.weight", "1.0.bias"]
    assert plain[1][0].calls == 0


def test_a_model_that_compiles_in_place_is_traced() -> None:
    model = nn.Sequential(Counting(4, 4), Counting(4, 4))
    model[0].compile(backend="eager", fullgraph=True)
    model.compile(backend="eager", fullgraph=True)
    assert traced(model).get_update_order() == ["1", "0"]
    assert model[0].calls == model[1].calls == 0


def test_lazy_modules_without_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"0\.weight has no shape yet: run a forward pass"):
        DependencyGraphBuilder(nn.Sequential(nn.LazyLinear(4)))


# --- Edges ---------------------------------------------------------------------------------------


def test_edges_lead_from_later_layers_to_earlier_ones_across_what_owns_nothing() -> None:
    model = nn.Sequential(square(), nn.ReLU(), nn.Dropout(), square(), nn.Softmax(-1), square())
    graph = traced(model).build_dependency_graph()
    assert isinstance(graph, networkx.DiGraph)
    assert list(graph) == ["5", "3", "0"]
    assert set(graph.edges) == {("5", "3"), ("3", "0")}
    assert dict(graph.nodes["3"]) == {
        "param_count": 20, "size_bytes": 80, "order": 2, "depth": 1, "used": True
    }  # fmt: skip


def test_a_residual_leads_past_the_layers_in_between() -> None:
    def forward(m: Model, x: Tensor) -> Tensor:
        x = m.a(x)
        x = x + m.b(x)
        return m.c(x)

    assert edges(Model(forward)) == {("c", "b"), ("c", "a"), ("b", "a")}


def test_branches_meet_and_have_one_depth() -> None:
    def forward(m: Model, x: Tensor) -> Tensor:
        x = m.a(x)
        return m.d(torch.cat([m.b(x)[:, :2], m.c(x)[:, 2:]], dim=1))

    graph = traced(Model(forward)).build_dependency_graph()
    assert set(graph.edges) == {("d", "b"), ("d", "c"), ("b", "a"), ("c", "a")}
    assert graph.nodes(data="depth")["b"] == graph.nodes(data="depth")["c"] == 1
    assert graph.nodes(data="depth")["a"] == 2


def test_writes_through_views_are_followed() -> None:
    def forward(m: Model, x: Tensor) -> Tensor:
        kept = torch.zeros(3, 8)
        kept[:, :4] = m.a(x)
        kept.view(3, 2, 4)[:, 1].copy_(m.b(x)).relu_()
        torch._foreach_add_([kept[:, 4:]], [m.d(x)])
        return m.c(kept[:, 2:6])

    assert edges(Model(forward)) == {("c", "a"), ("c", "b"), ("c", "d")}


def test_weights_that_are_transformed_belong_to_their_layer() -> None:
    def forward(m: Model, x: Tensor) -> Tensor:
        weight = m.b.weight.t().to(torch.float64) / m.b.weight.norm().double()
        return m.c((m.a(x).double() @ weight).float())

    assert edges(Model(forward)) == {("c", "b"), ("b", "a")}


def test_weights_that_are_written_to_stay_weights() -> None:
    def forward(m: Model, x: Tensor) -> Tensor:
        view = m.b.weight.detach().view(2, 8)
        with torch.no_grad():
            m.b.weight.add_(x.mean())
        return m.c(m.a(x) @ view.view(4, 4))

    assert edges(Model(forward)) == {("c", "b"), ("b", "a")}


def test_a_layer_that_works_on_another_ones_weights_comes_after_it() -> None:
    # Learned queries: nothing but weights goes into b.
    def forward(m: Model, x: Tensor) -> Tensor:
        return m.c(m.b(m.shift.expand(3, 4)) + m.a(x))

    assert edges(Model(forward)) == {("b", "(root)"), ("c", "a"), ("c", "b")}
    assert order(forward) == ["c", "a", "b", "(root)"]
    assert order(lambda m, x: m.b(m.d.weight) @ m.a(x).t()) == ["a", "b", "d"]


def test_embeddings_of_constant_positions_are_side_by_side_with_those_of_tokens() -> None:
    class Embeddings(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.places, self.norm = nn.Embedding(9, 4), square(), nn.LayerNorm(4)
            self.places = nn.Embedding(5, 4)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.norm(self.words(tokens) + self.places(torch.arange(tokens.shape[1])))

    tokens = torch.zeros(2, 5, dtype=torch.long)
    assert edges(Embeddings(), tokens) == {("norm", "words"), ("norm", "places")}


def kept_weights(model: Model, x: Tensor) -> Tensor:
    return model.d(model.c(model.b(model.a(x))))


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
def test_normalised_and_pruned_weights_are_followed() -> None:
    model = Model(kept_weights, **{name: nn.Linear(4, 4, bias=False) for name in "abc"})
    nn.utils.weight_norm(model.a)
    nn.utils.spectral_norm(model.b)
    prune.random_unstructured(model.c, "weight", 0.5)
    parametrizations.weight_norm(model.d)
    assert edges(model) == {
        ("d", "d.parametrizations.weight"), ("d", "c"), ("c", "b"), ("b", "a")
    }  # fmt: skip
    model.d = parametrizations.weight_norm(nn.Linear(4, 4, bias=False))
    assert edges(model) == {
        ("d.parametrizations.weight", "c"), ("c", "b"), ("b", "a")
    }  # fmt: skip


def in_autocast(m: Model, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return m.c(m.b(m.a(x)))


def without_gradient(m: Model, x: Tensor) -> Tensor:
    with torch.no_grad():
        x = m.b(m.a(x))
    return m.c(x)


def recomputed(m: Model, x: Tensor, reentrant: bool = False) -> Tensor:
    return m.c(checkpoint(lambda inner: m.b(m.a(inner)), x, use_reentrant=reentrant))


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 2


def through_a_function_of_its_own(m: Model, x: Tensor) -> Tensor:
    return m.c(Doubled.apply(m.b(m.a(x))))


def through_a_compiled_function(m: Model, x: Tensor) -> Tensor:
    return m.c(torch.compile(lambda y: m.b(y).relu(), backend=never_called)(m.a(x)))


def never_called(module: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
    raise AssertionError("compiled for tensors without data")


def by_a_gradient(m: Model, x: Tensor) -> Tensor:
    energy = m.b(m.a(x.requires_grad_()))
    (slope,) = torch.autograd.grad(energy.sum(), x)
    assert slope.shape == x.shape
    return m.c(energy)


def by_values(m: Model, x: Tensor) -> Tensor:
    x = m.a(x)
    return m.c(m.b(x[x[:, 0] > 0]) * x.sum().item())


def through_a_state(m: Model, x: Tensor) -> Tensor:
    m.state = m.b(m.a(x))
    return m.c(m.state)


@pytest.mark.parametrize(
    "forward",
    [
        in_autocast,
        without_gradient,
        recomputed,
        functools.partial(recomputed, reentrant=True),
        through_a_function_of_its_own,
        through_a_compiled_function,
        by_a_gradient,
        by_values,
        through_a_state,
    ],
)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_whatever_calls_the_layers_their_data_flow_is_seen(
    forward: Callable[..., Any], mode: Callable[[], Any]
) -> None:
    with mode():
        found = edges(Model(forward))
    assert found - {("a", "b")} == {("c", "b"), ("b", "a")}


def test_modules_kept_elsewhere_than_among_submodules_are_copied_with_them() -> None:
    def forward(m: Model, x: Tensor) -> Tensor:
        for step in m.steps:
            x = step(x)
        return m.by_name["c"](x)

    model = Model(forward, **{name: Counting(4, 4) for name in "abcd"})
    model.__dict__["steps"] = (model.b, model.a.forward, functools.partial(scaled, model.d))
    model.__dict__["by_name"] = {"c": model.c}
    assert edges(model) == {("c", "d"), ("d", "a"), ("a", "b")}
    assert [layer.calls for layer in (model.a, model.b, model.c, model.d)] == [0] * 4


def scaled(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x) * 2


# --- The order -----------------------------------------------------------------------------------


def test_the_order_is_that_of_use_not_of_registration() -> None:
    assert order(lambda m, x: m.a(m.c(m.b(m.d(x))))) == ["a", "c", "b", "d"]


def test_layers_that_are_not_used_come_last_latest_registered_first() -> None:
    builder = traced(Model(lambda m, x: m.a(m.d(x))))
    assert builder.get_update_order() == ["a", "d", "c", "b", "(root)"]
    assert "3 of 5 layers, which it does not use, come last" in builder.order_reason
    graph = builder.build_dependency_graph()
    assert [used for _, used in graph.nodes(data="used")] == [True, True, False, False, False]


def test_a_layer_used_twice_comes_where_it_was_used_first() -> None:
    model = Model(lambda m, x: m.c(m.b(m.a(m.b(x)))))
    builder = traced(model)
    assert builder.get_update_order()[:3] == ["c", "a", "b"]
    graph = builder.build_dependency_graph()
    assert set(graph.edges(data="again")) == {
        ("c", "b", False), ("b", "a", True), ("a", "b", False)
    }  # fmt: skip
    assert dict(graph.nodes(data="depth")) == {"c": 0, "a": 1, "b": 2, "d": 0, "(root)": 0}


def test_a_tied_weight_comes_last_as_its_first_use_is_the_models_first() -> None:
    model = nn.Sequential(nn.Embedding(7, 4), square(), nn.Linear(4, 7, bias=False))
    model[2].weight = model[0].weight
    graph = traced(model, torch.zeros(2, dtype=torch.long)).build_dependency_graph()
    assert list(graph) == ["1", "0"]
    assert set(graph.edges(data="again")) == {("1", "0", False), ("0", "1", True)}


MODELS: dict[str, Callable[[], tuple[nn.Module, tuple[Tensor, ...]]]] = {
    "reused": lambda: (Model(lambda m, x: m.c(m.b(m.a(m.b(x))) + m.shift)), (ROWS,)),
    "crossing": lambda: (Model(lambda m, x: m.d(x) + m.a(m.b(x)) + m.c(m.d(x))), (ROWS,)),
    "nested": lambda: (nn.Sequential(nn.Sequential(square(), nn.ReLU()), square()), (ROWS,)),
    "batch norm": lambda: (
        nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 2)),
        (torch.ones(2, 1, 4, 4),),
    ),
    "transformer": lambda: (
        nn.Transformer(4, 2, 2, 2, 8, batch_first=True),
        (torch.ones(2, 3, 4), torch.ones(2, 5, 4)),
    ),
    "recurrent": lambda: (Recurrent(), (ROWS.unsqueeze(0),)),
}


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head, self.lstm, self.start = square(), nn.LSTM(4, 4, 2), square()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(self.start(x))[0])


@pytest.mark.parametrize("name", MODELS)
def test_the_traced_order_is_that_in_which_gradients_become_ready(name: str) -> None:
    model, inputs = MODELS[name]()
    builder = traced(model, inputs)
    watched = GradientOrder(builder.group_parameters_by_layer())
    model(*inputs).sum().backward()
    watched.close()
    assert builder.get_update_order() == watched.update_order()


def test_every_layer_comes_before_those_whose_output_it_works_on() -> None:
    graph = traced(*MODELS["transformer"]()).build_dependency_graph()
    place = graph.nodes(data="order")
    assert list(place) == [(layer, i) for i, layer in enumerate(graph, start=1)]
    assert all(place[consumer] < place[producer] for consumer, producer in graph.edges)
    depth = graph.nodes(data="depth")
    assert all(depth[consumer] < depth[producer] for consumer, producer in graph.edges)


# --- What forward is called with -----------------------------------------------------------------


@dataclass
class Batch:
    rows: Tensor
    scale: float


def taking(m: Model, batch: Any, *, more: Any = None) -> Any:
    """From whatever it comes in."""
    rows, factor = (batch.rows, batch.scale) if isinstance(batch, Batch) else (batch, 1)
    x = m.a(rows) * factor
    return Batch(m.b(x if more is None else x + m.c(more["rows"][0])), 1.0)


@pytest.mark.parametrize(
    ("inputs", "used"),
    [
        (ROWS, "ba"),
        ((ROWS,), "ba"),
        ({"batch": ROWS}, "ba"),
        (((ROWS,), {"more": {"rows": [ROWS]}}), "bca"),
        ((Batch(ROWS, 2.0),), "ba"),
        (((Batch(ROWS, 2.0),), {"more": types.MappingProxyType({"rows": (ROWS,)})}), "bca"),
    ],
)
def test_inputs_may_be_given_in_any_form(inputs: Any, used: str) -> None:
    builder = traced(Model(taking), inputs)
    assert builder.get_update_order()[: len(used)] == list(used)


@pytest.mark.parametrize("wrong", [3, [ROWS], "rows", ROWS.numpy()])
def test_other_inputs_are_refused(wrong: object) -> None:
    with pytest.raises(TypeError, match="example_inputs must be a tensor, a tuple"):
        DependencyGraphBuilder(Model(taking), example_inputs=wrong)


def test_other_arguments_that_cannot_be_are_refused() -> None:
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got dict"):
        DependencyGraphBuilder({})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="trace_limit_s must be positive, not 0"):
        DependencyGraphBuilder(square(), trace_limit_s=0)
    watched = GradientOrder(group_parameters_by_layer(nn.Sequential(square())))
    with pytest.raises(ValueError, match="gradient_order watches other layers than model has"):
        DependencyGraphBuilder(square(), gradient_order=watched)


def test_inputs_are_taken_to_be_where_the_model_is() -> None:
    with torch.device("meta"):
        model = nn.Sequential(square(), nn.BatchNorm1d(4), square())
    assert traced(model).get_update_order() == ["2", "1", "0"]


# --- Nothing is changed --------------------------------------------------------------------------


class Restless(nn.Module):
    """Does in forward whatever leaves traces."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4, max_norm=0.1)
        self.norm = nn.BatchNorm1d(4)
        self.spectral = nn.utils.spectral_norm(square())
        self.register_buffer("seen", torch.zeros(4))
        self.log: list[Tensor] = []
        self.calls = 0
        self.last: Tensor | None = None

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(self.embed(tokens))
        x = nn.functional.dropout(x + torch.rand(4), 0.5) * random.random() * np.random.rand()
        self.seen += x.detach().sum(0)
        self.seen.data.mul_(2)
        self.calls += 1
        self.last = x
        self.log.append(x)
        self.eval()
        tokens.zero_()
        return self.spectral(x)


def everything(model: nn.Module) -> dict[str, Any]:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {
        "bytes": {name: tensor.detach().clone() for name, tensor in tensors.items()},
        "tensors": [(id(t), t.data_ptr(), t._version, t.requires_grad) for t in tensors.values()],
        "gradients": [t.grad for t in tensors.values()],
        "training": [module.training for module in model.modules()],
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "hooks": [
            [key for hooks in (m._forward_hooks, m._forward_pre_hooks) for key in hooks]
            for m in model.modules()
        ],
        "generators": [random.getstate(), np.random.get_state(), torch.get_rng_state()],
        "grad mode": [torch.is_grad_enabled(), torch.is_inference_mode_enabled()],
    }


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_tracing_changes_nothing(mode: Callable[[], Any]) -> None:
    model = Restless()
    called: list[object] = []
    for module in model.modules():
        module.register_forward_hook(lambda *_: called.append(1))
        module.register_forward_pre_hook(lambda *_: called.append(2))
        module.register_full_backward_hook(lambda *_: called.append(3))
    tokens = torch.arange(3)
    with mode():
        before = everything(model)
        builder = traced(model, tokens)
        assert builder.get_update_order() == ["spectral", "norm", "embed"]
        assert_same(everything(model), before)
    assert not called
    assert tokens.tolist() == [0, 1, 2]
    assert tokens._version == 0
    assert (model.calls, model.last, model.log) == (0, None, [])


def test_tracing_takes_no_memory_for_tensors() -> None:
    with torch.device("meta"):  # 16 TB: copies of another kind could not be made
        model = nn.Sequential(nn.Linear(1 << 20, 1 << 20), nn.Linear(1 << 20, 1 << 20))
    assert traced(model, torch.empty(1, 1).expand(4, 1 << 20)).get_update_order() == ["1", "0"]


def test_no_kernel_runs() -> None:
    ran: list[Tensor] = []

    @torch.library.custom_op("pccheck_test::without_shape_rule", mutates_args=())
    def without_shape_rule(x: Tensor) -> Tensor:
        ran.append(x)
        return x.clone()

    forwards: dict[str, Callable[..., Any]] = {
        "without_shape_rule": lambda m, x: m.b(without_shape_rule(m.a(x))),
        "aten._to_sparse": lambda m, x: m.a(x).to_sparse() @ m.b.weight,  # torch's own, has none
    }
    for told, forward in forwards.items():
        builder = DependencyGraphBuilder(Model(forward), example_inputs=ROWS)
        assert builder.order_source == "registration"
        assert told in builder.order_reason
    assert not ran


def test_no_compiled_code_runs() -> None:
    ran: list[object] = []

    def backend(module: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        return lambda *args: (ran.append(args), module.forward(*args))[1]

    table = torch.compile(lambda count: torch.arange(count).float(), backend=backend)
    model = Model(lambda m, x: m.a(x + table(4)))
    model(ROWS)
    assert len(ran) == 1
    assert traced(model).get_update_order()[0] == "a"
    assert len(ran) == 1


def test_tensors_of_others_are_read_but_never_written() -> None:
    outside = torch.ones(4)
    reading = Model(lambda m, x: m.b(m.a(x) * outside))
    assert edges(reading) == {("b", "a")}
    writing = Model(lambda m, x: m.b(m.a(x) * outside.add_(1)))
    builder = DependencyGraphBuilder(writing, example_inputs=ROWS)
    assert "writes to a tensor that is not the model's own" in builder.order_reason
    assert outside.tolist() == [1, 1, 1, 1]
    assert outside._version == 0


def test_the_models_own_parameters_are_known_behind_a_closure_too() -> None:
    hidden = square()
    model = Model(lambda m, x: m.b(nn.functional.linear(m.a(x), hidden.weight)), hidden=hidden)
    versions = [parameter._version for parameter in model.parameters()]
    assert edges(model) == {("b", "hidden"), ("hidden", "a")}
    assert [parameter._version for parameter in model.parameters()] == versions


def test_it_is_told_where_forward_keeps_tensors_without_data() -> None:
    cache: list[Tensor] = []

    def forward(m: Model, x: Tensor) -> Tensor:
        cache.append(m.a(x))
        return m.b(cache[-1])

    builder = DependencyGraphBuilder(Model(forward), example_inputs=ROWS)
    with pytest.warns(RuntimeWarning, match="keeps some of them outside the model"):
        assert builder.order_source == "data flow"


# --- What cannot be traced -----------------------------------------------------------------------


def failing(m: Model, x: Tensor) -> Tensor:
    raise ZeroDivisionError("first line\nsecond line")


def branching(m: Model, x: Tensor) -> Tensor:
    x = m.a(x)
    return m.b(x) if x.sum() > 0 else m.c(x)


def mismatching(m: Model, x: Tensor) -> Tensor:
    return m.a(x[:, :3])


def taking_more(m: Model, x: Tensor, y: Tensor) -> Tensor:
    return m.a(x) + y


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (failing, "tracing failed with ZeroDivisionError: first line"),
        (branching, "tracing failed with GuardOnDataDependentSymNode: Could not guard"),
        (mismatching, "tracing failed with RuntimeError: a and b must have same reduction dim"),
        (taking_more, "tracing failed with TypeError: taking_more() missing 1 required"),
    ],
)
def test_what_cannot_be_traced_is_no_error_and_it_is_told_why(
    forward: Callable[..., Any],
    reason: str,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    builder = DependencyGraphBuilder(Model(forward), example_inputs=ROWS)
    assert builder.get_update_order() == ["d", "c", "b", "a", "(root)"]
    assert builder.order_source == "registration"
    assert builder.order_reason.startswith(f"no backward pass was observed; {reason}")
    assert "\n" not in builder.order_reason
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


def test_modules_of_torch_jit_are_not_traced() -> None:
    with pytest.warns(DeprecationWarning, match=r"torch\.jit\.script"):
        scripted = torch.jit.script(square())
    builder = DependencyGraphBuilder(nn.Sequential(scripted), example_inputs=ROWS)
    assert builder.order_source == "registration"
    assert "modules of torch.jit" in builder.order_reason


def test_tracing_that_takes_long_is_given_up() -> None:
    calls = 0

    def forward(m: Model, x: Tensor) -> Tensor:
        nonlocal calls
        while True:
            calls += 1
            x = m.a(x)

    builder = DependencyGraphBuilder(Model(forward), example_inputs=ROWS, trace_limit_s=0.05)
    assert builder.order_source == "registration"
    assert "TimeoutError: the time allowed for it has passed" in builder.order_reason
    assert calls > 0


def test_tracing_can_be_given_up_at_any_moment() -> None:
    model = Model(lambda m, x: m.b(torch.zeros(3, 4) + m.a(x)))
    layers = group_parameters_by_layer(model)
    readings = itertools.count()

    def flow(limit: float) -> DataFlow | str:
        inputs = Inputs((ROWS,), {})
        return record_data_flow(model, layers, inputs, limit_s=limit, clock=lambda: next(readings))

    assert isinstance(flow(1000), DataFlow)
    moments = next(readings) - 1
    assert moments == 6
    for moment in range(1, moments):
        assert "TimeoutError" in str(flow(moment))
    assert isinstance(flow(moments), DataFlow)


def test_an_interrupt_is_not_swallowed_and_leaves_everything_as_it_was() -> None:
    def forward(m: Model, x: Tensor) -> Tensor:
        random.random()
        m.a(x)
        raise KeyboardInterrupt

    model = Model(forward)
    before = everything(model)
    with pytest.raises(KeyboardInterrupt):
        DependencyGraphBuilder(model, example_inputs=ROWS).get_update_order()
    assert_same(everything(model), before)
    assert type(torch.zeros(1) + 1) is Tensor


def test_without_inputs_the_order_is_that_of_registration_reversed() -> None:
    builder = DependencyGraphBuilder(nn.Sequential(square(), square(), square()))
    graph = builder.build_dependency_graph()
    assert builder.get_update_order() == ["2", "1", "0"]
    assert list(graph.edges) == [("2", "1"), ("1", "0")]
    assert graph.graph == {
        "order_source": "registration",
        "order_reason": "no backward pass was observed; no example inputs were given to trace with",
    }


def test_gradients_that_were_observed_come_before_registration() -> None:
    model = Model(lambda m, x: m.b(m.d(m.a(x))))
    builder = DependencyGraphBuilder(model)
    assert builder.order_source == "registration"
    watched = builder.observe_gradients()
    model(ROWS).sum().backward()
    watched.close()
    assert builder.get_update_order() == ["b", "d", "a", "c", "(root)"]
    assert builder.order_source == "gradients"
    assert list(builder.build_dependency_graph().edges)[:2] == [("b", "d"), ("d", "a")]

    given = DependencyGraphBuilder(model, gradient_order=watched)
    assert given.get_update_order() == builder.get_update_order()
    assert given.order_reason == (
        "a backward pass was observed; no example inputs were given to trace with"
    )


def test_data_flow_comes_before_gradients() -> None:
    model = Model(lambda m, x: m.b(m.a(x)))
    builder = DependencyGraphBuilder(model, example_inputs=ROWS)
    watched = builder.observe_gradients()
    model(ROWS).sum().backward()
    watched.close()
    assert builder.order_source == "data flow"


# --- The first forward pass ----------------------------------------------------------------------


def test_the_first_forward_tells_what_to_trace_with() -> None:
    model = Model(taking)
    first = capture_first_forward(model)
    builder = DependencyGraphBuilder(model, example_inputs=first)
    assert builder.order_source == "registration"
    assert "no forward pass has been seen" in builder.order_reason
    model(Batch(ROWS, 2.0), more={"rows": [ROWS]})
    assert not model._forward_pre_hooks
    builder.build_dependency_graph()
    assert builder.get_update_order()[:3] == ["b", "c", "a"]
    assert builder.order_source == "data flow"


def test_of_the_first_forwards_tensors_only_the_form_is_kept() -> None:
    model = Model(taking)
    first = capture_first_forward(model)
    rows = ROWS.clone().t().contiguous().t().requires_grad_()
    gone = weakref.ref(rows)
    model(Batch(rows, 2.0), more={"rows": [rows]})
    del rows
    assert gone() is None
    assert first.inputs is not None
    (batch,) = first.inputs.args
    assert batch.scale == 2.0
    form = batch.rows
    assert form == first.inputs.kwargs["more"]["rows"][0]
    assert (form.shape, form.stride, form.dtype) == ((3, 4), (1, 3), torch.float32)
    assert form.device == torch.device("cpu")
    assert form.requires_grad


def test_later_forwards_are_not_looked_at() -> None:
    model = nn.Sequential(square())
    first = capture_first_forward(model)
    model(ROWS)
    seen = first.inputs
    model(ROWS[:1])
    assert first.inputs is seen
    closed = capture_first_forward(model)
    closed.close()
    closed.close()
    model(ROWS)
    assert closed.inputs is None


def test_the_first_forwards_autocast_is_traced_with() -> None:
    def forward(m: Model, x: Tensor) -> Tensor:
        x = m.a(x)
        return m.b(x) if x.dtype == torch.bfloat16 else m.c(x)

    model = Model(forward)
    first = capture_first_forward(model)
    with torch.autocast("cpu", torch.bfloat16):
        model(ROWS)
    assert edges(model, first) == {("b", "a")}


def test_inputs_that_cannot_be_described_disturb_no_training() -> None:
    class Shapeless(Tensor):
        def stride(self, *args: Any) -> Any:
            raise RuntimeError("of no stride")

    model = nn.Sequential(square())
    first = capture_first_forward(model)
    model(ROWS.as_subclass(Shapeless))
    builder = DependencyGraphBuilder(model, example_inputs=first)
    assert builder.order_reason.endswith("were not understood: RuntimeError: of no stride")


@pytest.mark.parametrize("how", ["around", "before", "in place"])
def test_watching_a_compiled_model_neither_breaks_its_graph_nor_compiles_it_twice(how: str) -> None:
    torch._dynamo.reset()
    compiled: list[object] = []

    def backend(module: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        compiled.append(module)
        return module.forward

    model = nn.Sequential(square(), nn.ReLU(), square())
    if how == "around":
        run = torch.compile(model, backend=backend, fullgraph=True)
        first = capture_first_forward(run)
    else:
        first = capture_first_forward(model)
        run = model
        if how == "before":
            run = torch.compile(model, backend=backend, fullgraph=True)
        else:
            model.compile(backend=backend, fullgraph=True)
    run(ROWS)
    run(ROWS)
    assert len(compiled) == 1
    assert (first.inputs is not None) == (how == "around")
    builder = DependencyGraphBuilder(run, example_inputs=first)
    assert builder.get_update_order() == ["2", "0"]
    assert len(compiled) == 1


# --- What is told --------------------------------------------------------------------------------


def test_verbose_prints_a_summary(capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.Sequential(*(square() for _ in range(12)))
    DependencyGraphBuilder(model, verbose=True, example_inputs=ROWS).build_dependency_graph()
    assert capsys.readouterr().out == (
        "pccheck_ext: 12 layers, 240 parameters, 960 B\n"
        "  update order from data flow: a forward pass was traced\n"
        "  11 > 10 > 9 > 8 > (4 more) > 3 > 2 > 1 > 0\n"
    )
    DependencyGraphBuilder(model, example_inputs=ROWS).build_dependency_graph()
    assert capsys.readouterr() == ("", "")


def test_a_graph_that_is_changed_does_not_change_the_order() -> None:
    builder = traced(nn.Sequential(square(), square()))
    builder.build_dependency_graph().clear()
    assert builder.get_update_order() == ["1", "0"]


def test_a_model_without_parameters_has_no_layers() -> None:
    builder = traced(nn.Sequential(nn.ReLU()))
    assert builder.get_update_order() == []
    assert builder.layer_info == {}


def test_hooks_on_the_parameters_go_after_the_first_step_though_nothing_is_saved(
    tmp_path: Path,
) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    trainer = LayerwiseCheckpointTrainer(
        model, torch.optim.SGD(model.parameters()), checkpoint_dir=tmp_path, checkpoint_every=50
    )

    def hooks() -> int:
        return sum(len(p._post_accumulate_grad_hooks or ()) for p in model.parameters())

    before = hooks()
    for _ in range(2):
        trainer.zero_grad()
        model(torch.ones(1, 2)).sum().backward()
        trainer.step()
    assert hooks() <= before - 4
    trainer.shutdown()


def test_a_module_whose_name_ends_as_a_compiled_ones_attribute_keeps_it() -> None:
    model = nn.Module()
    model.my_orig_mod = nn.Sequential(nn.Linear(2, 2))
    assert list(group_parameters_by_layer(model)) == ["my_orig_mod.0"]
    compiled = torch.compile(model, backend="eager")
    assert list(group_parameters_by_layer(compiled)) == ["my_orig_mod.0"]
