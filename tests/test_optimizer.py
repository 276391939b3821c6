"""LayerwiseOptimizer: the base optimizer's results, bit for bit, one layer at a time."""

from __future__ import annotations

import contextlib
import copy
import pickle
import subprocess
import sys
import threading
import types
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from pccheck_ext.optimizer import LayerwiseOptimizer


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tensors this small gain nothing from more, and on a busy machine threads wait for threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


FOREACH = ["default", "foreach", "for-loop"]
MODES = {"default": {}, "foreach": {"foreach": True}, "for-loop": {"foreach": False}}
FUSED = {"fused": {"fused": True}}

# Settings that switch on what an optimizer can do beyond its defaults.
OPTIMIZERS: dict[str, tuple[type[Optimizer], list[dict], list[str]]] = {
    "SGD": (
        torch.optim.SGD,
        [{"lr": 0.1}, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}],
        [*FOREACH, "fused"],
    ),
    "Adam": (
        torch.optim.Adam,
        [{"lr": 0.01}, {"lr": 0.01, "amsgrad": True, "maximize": True, "weight_decay": 0.1}],
        [*FOREACH, "fused"],
    ),
    "AdamW": (
        torch.optim.AdamW,
        [{"lr": 0.01}, {"lr": 0.01, "amsgrad": True}],
        [*FOREACH, "fused"],
    ),
    "Adagrad": (
        torch.optim.Adagrad,
        [{"lr": 0.1, "lr_decay": 0.1, "initial_accumulator_value": 0.1}],
        [*FOREACH, "fused"],
    ),
    "Adadelta": (torch.optim.Adadelta, [{"lr": 1.0}], FOREACH),
    "Adafactor": (torch.optim.Adafactor, [{"lr": 0.05, "weight_decay": 0.1}], FOREACH),
    "Adamax": (torch.optim.Adamax, [{"lr": 0.01}], FOREACH),
    "ASGD": (torch.optim.ASGD, [{"lr": 0.05, "t0": 2.0}], FOREACH),
    "NAdam": (torch.optim.NAdam, [{"lr": 0.01, "decoupled_weight_decay": True}], FOREACH),
    "RAdam": (torch.optim.RAdam, [{"lr": 0.01}], FOREACH),
    "RMSprop": (
        torch.optim.RMSprop,
        [{"lr": 0.01}, {"lr": 0.01, "centered": True, "momentum": 0.5}],
        FOREACH,
    ),
    "Rprop": (torch.optim.Rprop, [{"lr": 0.01}], FOREACH),
    "Muon": (torch.optim.Muon, [{"lr": 0.01}, {"lr": 0.01, "weight_decay": 0.3}], ["default"]),
}
# torch's fused SGD fails where a momentum is missing after the first step: all must be there then.
STEPS = {(torch.optim.SGD, "fused"): range(1, 7)}
CASES = [
    pytest.param(
        kind,
        {**settings, **{**MODES, **FUSED}[mode]},
        STEPS.get((kind, mode), range(6)),
        id=f"{name}-{mode}-{number}",
    )
    for name, (kind, variants, modes) in OPTIMIZERS.items()
    for number, settings in enumerate(variants)
    for mode in modes
]


class Net(nn.Module):
    """Tied weights, a frozen layer, one that gets gradients on odd steps only, a root parameter,
    a 0-d parameter, two dtypes."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.embed = nn.Embedding(11, 6)
        self.norm = nn.LayerNorm(6)
        self.first = nn.Linear(6, 8)
        self.frozen = nn.Linear(8, 8)
        self.frozen.requires_grad_(False)
        self.sometimes = nn.Linear(8, 8)
        self.wide = nn.Linear(8, 6, dtype=torch.float64)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor, step: int) -> torch.Tensor:
        x = torch.relu(self.first(self.norm(self.embed(tokens))))
        x = self.frozen(x)
        if step % 2:
            x = x + self.sometimes(x)
        x = self.wide(x.double()).float() * self.scale
        return self.head(x)


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net()


def layers_of(model: nn.Module) -> dict[str, list[torch.Tensor]]:
    """Every module's own parameters; the tied weight is in two layers."""
    found = {name: list(m.parameters(recurse=False)) for name, m in model.named_modules()}
    return {name or "root": params for name, params in found.items() if params}


def groups_of(model: nn.Module, kind: type[Optimizer]) -> list[dict]:
    """Three param groups with settings of their own, whose members are spread over the layers."""
    params = [p for p in model.parameters() if p.requires_grad]
    if kind is torch.optim.Muon:
        params = [p for p in params if p.dim() == 2]
    matrices = [p for p in params if p.dim() == 2]
    groups = [
        {"params": [p for p in params if p.dim() != 2]},
        {"params": matrices[::2], "lr": 0.02, "weight_decay": 0.2},
        {"params": matrices[1::2], "lr": 0.03},
    ]
    if kind is torch.optim.Rprop:
        del groups[1]["weight_decay"]
    return [group for group in groups if group["params"]]


def wrap(
    base: Optimizer, model: nn.Module, callback: Callable | None = None, **more: object
) -> LayerwiseOptimizer:
    layers = layers_of(model)
    return LayerwiseOptimizer(base, list(reversed(layers)), layers, callback, **more)


def ignore(*args: object) -> None:
    """A callback: with one, every step is taken by layer."""


def loss_of(model: Net, step: int) -> torch.Tensor:
    random = torch.Generator().manual_seed(1000 + step)
    tokens = torch.randint(0, 11, (4, 5), generator=random)
    out = model(tokens, step)
    return nn.functional.cross_entropy(out.flatten(0, 1), tokens.flatten().roll(1))


def train(model: Net, optimizer: Optimizer, steps: range, scheduler: object = None) -> None:
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, step).backward()
        nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 0.5)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


def raw_bytes(value: object) -> object:
    """Nested state with every tensor as its dtype, shape and bytes."""
    if isinstance(value, torch.Tensor):
        dense = value.detach().to_dense() if value.is_sparse else value.detach()
        return (str(dense.dtype), tuple(dense.shape), dense.contiguous().numpy().tobytes())
    if isinstance(value, dict):
        return {key: raw_bytes(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [raw_bytes(item) for item in value]
    return value


def same(
    model: nn.Module, optimizer: Optimizer, expected: nn.Module, expected_optimizer: Optimizer
) -> bool:
    return raw_bytes(model.state_dict()) == raw_bytes(expected.state_dict()) and raw_bytes(
        optimizer.state_dict()
    ) == raw_bytes(expected_optimizer.state_dict())


class Recorder:
    """An observer that writes down what it is told, with the weights at that moment."""

    def __init__(self, wants: bool = True, watch: nn.Module | None = None) -> None:
        self.wants = wants
        self.watch = watch
        self.events: list[object] = []
        self.weights: list[object] = []
        self.raises: dict[object, BaseException] = {}
        self.lock = threading.Lock()  # cannot be pickled

    def note(self, event: object) -> None:
        self.events.append(event)
        if self.watch is not None:
            self.weights.append(raw_bytes(self.watch.state_dict()))
        if event in self.raises:
            raise self.raises[event]

    def before_step(self) -> bool:
        self.note("before_step")
        return self.wants

    def before_update(self, layer: str | None) -> None:
        self.note(("gate", layer))

    def after_layer(self, layer: str) -> None:
        self.note(("layer", layer))

    def after_step(self, applied: bool) -> None:
        self.note(("after_step", applied))

    def abort_step(self, error: BaseException) -> None:
        self.note(("abort", type(error).__name__))

    def named(self, what: str) -> list[str]:
        return [event[1] for event in self.events if event[0] == what]


def small(
    kind: type[Optimizer] = torch.optim.SGD, callback: Callable | None = None, **settings: object
) -> tuple[nn.Sequential, Optimizer, LayerwiseOptimizer, Recorder]:
    """Three linear layers '0', '1', '2' with gradients, updated in the order 2, 1, 0."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2))
    base = kind(model.parameters(), **{"lr": 0.1, **settings})
    optimizer = wrap(base, model, callback)
    optimizer._observer = Recorder(watch=model)
    model(torch.randn(4, 3)).square().sum().backward()
    return model, base, optimizer, optimizer._observer


@contextlib.contextmanager
def removing(handle: object) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


# --- the same bits as the base ---------------------------------------------------------------


@pytest.mark.parametrize(("kind", "settings", "steps"), CASES)
def test_layerwise_steps_equal_the_base_optimizers_steps_bit_for_bit(kind, settings, steps) -> None:
    expected = net()
    plain = kind(groups_of(expected, kind), **settings)
    train(expected, plain, steps, torch.optim.lr_scheduler.StepLR(plain, 2, gamma=0.5))

    model = net()
    optimizer = wrap(kind(groups_of(model, kind), **settings), model, ignore)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)
    train(model, optimizer, steps, scheduler)

    assert optimizer.get_statistics()["layerwise_steps"] == 6
    assert same(model, optimizer, expected, plain)
    assert raw_bytes(model.state_dict()) != raw_bytes(net().state_dict())


@pytest.mark.parametrize(("kind", "settings", "steps"), CASES)
def test_fast_and_layerwise_steps_may_alternate(kind, settings, steps) -> None:
    expected = net()
    plain = kind(groups_of(expected, kind), **settings)
    train(expected, plain, steps)

    model = net()
    optimizer = wrap(kind(groups_of(model, kind), **settings), model)
    recorder = optimizer._observer = Recorder()
    for step in steps:
        recorder.wants = step % 3 == 1
        train(model, optimizer, range(step, step + 1))

    statistics = optimizer.get_statistics()
    assert (statistics["fast_steps"], statistics["layerwise_steps"]) == (4, 2)
    assert same(model, optimizer, expected, plain)


class Sparse(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Embedding(9, 4, sparse=True)
        self.two = nn.Embedding(9, 4, sparse=True)
        self.dense = nn.Linear(4, 4)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.dense(self.one(tokens) + self.two(tokens % 5)).square().mean()


def train_sparse(model: Sparse, optimizer: Optimizer) -> None:
    for step in range(5):
        optimizer.zero_grad()
        model(torch.tensor([step, step + 1, step + 1])).backward()
        optimizer.step()


@pytest.mark.parametrize(
    "before", ["", "torch.optim.SparseAdam([torch.nn.Parameter(torch.ones(2))])"]
)
def test_sparse_adam_is_stepped_by_layer_after_torch_compile_was_used_too(before: str) -> None:
    """It then keeps out of SparseAdam's step, whether the class has been used before or not."""
    program = f"""
import torch
from pccheck_ext import LayerwiseOptimizer
{before}
torch.compile(lambda x: x + 1, backend="eager")(torch.ones(2))
rows = torch.nn.Embedding(10, 3, sparse=True)
layers = {{"rows": list(rows.parameters())}}
base = torch.optim.SparseAdam(rows.parameters())
optimizer = LayerwiseOptimizer(base, ["rows"], layers, callback=lambda *_: None)
rows(torch.tensor([1, 2])).sum().backward()
optimizer.step()
assert optimizer.get_statistics()["layerwise_steps"] == 1
"""
    subprocess.run(
        [sys.executable, "-W", "error::UserWarning:pccheck_ext", "-c", program], check=True
    )


def test_sparse_adam_is_stepped_by_layer() -> None:
    def sparse_adam(model: Sparse) -> Optimizer:
        return torch.optim.SparseAdam([model.one.weight, model.two.weight], lr=0.1)

    torch.manual_seed(0)
    model = Sparse()
    expected = copy.deepcopy(model)
    plain = sparse_adam(expected)
    optimizer = wrap(sparse_adam(model), model, ignore)
    train_sparse(expected, plain)
    train_sparse(model, optimizer)
    assert optimizer.get_statistics()["layerwise_steps"] == 5
    assert same(model, optimizer, expected, plain)


@pytest.mark.parametrize("mode", FOREACH)
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adagrad])
def test_sparse_and_dense_gradients_together_give_the_bases_bits(kind, mode) -> None:
    torch.manual_seed(0)
    model = Sparse()
    expected = copy.deepcopy(model)
    plain = kind(expected.parameters(), lr=0.3, **MODES[mode])
    optimizer = wrap(kind(model.parameters(), lr=0.3, **MODES[mode]), model, ignore)
    train_sparse(expected, plain)
    if mode == "foreach":
        with pytest.warns(UserWarning, match=rf"{kind.__name__} is stepped whole.*sparse"):
            train_sparse(model, optimizer)
        assert optimizer.get_statistics()["whole_steps"] == 5
    else:
        train_sparse(model, optimizer)
        assert optimizer.get_statistics()["layerwise_steps"] == 5
    assert same(model, optimizer, expected, plain)


class OddParameter(nn.Parameter):
    """A parameter type for which torch has no foreach kernels."""


def test_a_layer_uses_the_kernels_that_its_whole_group_would_use(monkeypatch) -> None:
    # As on a GPU, where foreach is the default unless one parameter of the group does not allow it.
    monkeypatch.setattr(
        sys.modules[Optimizer.__module__], "_get_foreach_kernels_supported_devices", lambda: ["cpu"]
    )

    def run(odd: bool, by_layer: bool) -> object:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 20))
        if odd:
            model[0].bias = OddParameter(model[0].bias.detach())
        optimizer = torch.optim.NAdam(model.parameters(), lr=0.01)
        if by_layer:
            optimizer = wrap(optimizer, model, ignore)
        for _ in range(4):
            optimizer.zero_grad()
            model(torch.randn(8, 20)).square().mean().backward()
            optimizer.step()
        assert optimizer.param_groups[0]["foreach"] is None
        return raw_bytes(model.state_dict())

    assert run(odd=True, by_layer=True) == run(odd=True, by_layer=False)
    assert run(odd=False, by_layer=True) == run(odd=False, by_layer=False)
    assert run(odd=True, by_layer=False) != run(odd=False, by_layer=False)


def test_a_parameter_in_two_layers_is_updated_once_with_the_first() -> None:
    weight = nn.Parameter(torch.ones(2))
    other = nn.Parameter(torch.ones(1))
    weight.grad, other.grad = torch.ones(2), torch.ones(1)
    seen: dict[str, list] = {}
    optimizer = LayerwiseOptimizer(
        torch.optim.SGD([weight, other], lr=1.0),
        ["b", "a"],
        {"a": [weight, other], "b": [weight]},
        lambda name, step, params: seen.update({name: [p.tolist() for p in params]}),
    )
    optimizer.step()
    assert weight.tolist() == [0.0, 0.0]
    assert seen == {"b": [[0.0, 0.0]], "a": [[0.0, 0.0], [0.0]]}


def test_a_parameter_twice_in_a_group_is_treated_as_the_base_treats_it() -> None:
    def run(by_layer: bool) -> list[float]:
        weight, other = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
        weight.grad, other.grad = torch.ones(1), torch.ones(1)
        with pytest.warns(UserWarning, match="duplicate"):
            optimizer = torch.optim.SGD([weight, other, weight], lr=0.25)
        if by_layer:
            layers = {"a": [weight], "b": [other]}
            optimizer = LayerwiseOptimizer(optimizer, ["a", "b"], layers, ignore)
        optimizer.step()
        return [*weight.tolist(), *other.tolist()]

    assert run(True) == run(False) == [0.5, 0.75]


def test_parameters_that_the_base_does_not_own_are_shown_but_never_updated() -> None:
    owned, frozen = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    owned.grad, frozen.grad = torch.ones(1), torch.ones(1)
    seen = {}
    optimizer = LayerwiseOptimizer(
        torch.optim.SGD([owned], lr=1.0),
        [],
        {"both": [frozen, owned], "frozen": [frozen]},
        lambda name, step, params: seen.update({name: [p.item() for p in params]}),
    )
    optimizer.step()
    assert seen == {"both": [1.0, 0.0], "frozen": [1.0]}


# --- the order of things ---------------------------------------------------------------------


def test_each_layer_passes_its_gate_is_updated_and_handed_over_before_the_next_one_changes() -> (
    None
):
    model, _, optimizer, recorder = small(torch.optim.AdamW)
    start = raw_bytes(model.state_dict())
    optimizer.step()
    assert recorder.events == [
        "before_step",
        ("gate", "2"), ("layer", "2"),
        ("gate", "1"), ("layer", "1"),
        ("gate", "0"), ("layer", "0"),
        ("after_step", True),
    ]  # fmt: skip
    final = raw_bytes(model.state_dict())
    for event, weights in zip(recorder.events, recorder.weights, strict=True):
        for layer in "012":
            changed = event[0] == "after_step" or (
                event != "before_step" and int(layer) > int(event[1]) - (event[0] == "layer")
            )
            wanted = final if changed else start
            for name in (f"{layer}.weight", f"{layer}.bias"):
                assert weights[name] == wanted[name], (event, name)


def test_without_takers_the_step_passes_one_gate_for_all_layers_and_hands_nothing_over() -> None:
    _, _, optimizer, recorder = small()
    recorder.wants = False
    optimizer.step()
    assert recorder.events == ["before_step", ("gate", None), ("after_step", True)]
    assert recorder.weights[1] == recorder.weights[0] != recorder.weights[2]
    assert optimizer.get_statistics()["fast_steps"] == 1


def test_a_callback_alone_passes_every_layers_gate() -> None:
    _, _, optimizer, recorder = small(callback=ignore)
    recorder.wants = False
    optimizer.step()
    assert recorder.named("gate") == ["2", "1", "0"]
    assert recorder.named("layer") == []


def test_unordered_layers_follow_the_ordered_ones_and_unlisted_parameters_come_last() -> None:
    one, two, three, four = (nn.Parameter(torch.ones(1)) for _ in range(4))
    for param in (one, two, three, four):
        param.grad = torch.ones(1)
    optimizer = LayerwiseOptimizer(
        torch.optim.SGD([four, one, two, three], lr=1.0),
        ["three"],
        {"unlisted": [one], "two": [two], "three": [three]},
    )
    recorder = optimizer._observer = Recorder()
    optimizer.step()
    assert recorder.named("layer") == ["three", "unlisted", "two", "unlisted_"]
    assert list(optimizer.layers) == ["three", "unlisted", "two", "unlisted_"]
    assert optimizer.layers["unlisted_"][0] is four
    assert [p.item() for p in (one, two, three, four)] == [0.0] * 4


def test_a_new_order_applies_from_the_next_step() -> None:
    model, _, optimizer, recorder = small()
    optimizer.step()
    layers = layers_of(model)
    optimizer.set_update_order(["1", "2"], {"1": layers["1"], "2": layers["2"] + layers["0"]})
    optimizer.step()
    assert recorder.named("layer") == ["2", "1", "0", "1", "2"]


def test_updated_tensors_have_new_version_counters_when_a_layer_is_handed_over() -> None:
    """Also where kernels leave them alone; and only those of parameters with a gradient."""
    model, base, optimizer, recorder = small(torch.optim.AdamW, fused=True)
    optimizer.step()  # makes the state
    model[1].bias.grad = None
    tensors = {name: [p, *base.state[p].values()] for name, p in model.named_parameters()}
    before = {name: [t._version for t in ts] for name, ts in tensors.items()}
    seen = {}

    def look(layer: str) -> None:
        now = {name: [t._version for t in ts] for name, ts in tensors.items()}
        for name in now:
            if name.startswith(layer):
                seen[name] = [a > b for a, b in zip(now[name], before[name], strict=True)]

    recorder.after_layer = look
    optimizer.step()
    assert seen.pop("1.bias") == [False] * 4
    assert seen == {name: [True] * 4 for name in seen}
    assert len(seen) == 5


@pytest.mark.parametrize(("kind", "settings", "steps"), CASES)
def test_whatever_a_layers_update_changed_has_a_new_version_counter(kind, settings, steps) -> None:
    model = net()
    base = kind(groups_of(model, kind), **settings)
    optimizer = wrap(base, model)
    train(model, optimizer, range(1))
    watched = {}
    changed = []

    class Watch(Recorder):
        def before_update(self, layer: str | None) -> None:
            for p in model.parameters():
                for t in (p, *(v for v in base.state[p].values() if isinstance(v, torch.Tensor))):
                    watched[id(t)] = t, t._version, raw_bytes(t)

        def after_layer(self, layer: str) -> None:
            for t, version, before in watched.values():
                if raw_bytes(t) != before:
                    changed.append(layer)
                    assert t._version > version, layer

    optimizer._observer = Watch()
    train(model, optimizer, range(1, 2))
    assert changed


# --- callbacks -------------------------------------------------------------------------------


def test_a_callback_gets_each_layer_after_its_update_with_the_number_of_the_step() -> None:
    model = net()
    calls = []
    optimizer = wrap(
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1),
        model,
        lambda name, step, params: calls.append((name, step, raw_bytes(params))),
    )
    train(model, optimizer, range(2))
    layers = layers_of(model)
    assert [(name, step) for name, step, _ in calls] == [
        (name, step) for step in (1, 2) for name in reversed(layers)
    ]
    for name, _, params in calls[len(layers) :]:
        assert params == raw_bytes(layers[name])


def test_what_a_callback_got_does_not_change_with_the_parameters_and_requires_no_grad() -> None:
    kept = {}
    model, _, optimizer, _ = small(
        callback=lambda name, step, params: kept.setdefault((name, step), params)
    )
    optimizer.step()
    then = raw_bytes(kept)
    weights = raw_bytes(model.state_dict())
    optimizer.step()
    for name in "012":
        kept[name, 1][0].zero_()
        then.pop((name, 1))[0] = None
    assert not any(p.requires_grad for params in kept.values() for p in params)
    assert all(raw_bytes(kept[name, 1][1]) == weights[f"{name}.bias"] for name in "012")
    optimizer.step()
    assert not any((p == 0).all() for p in model.parameters())


def test_a_callback_that_raises_does_not_leave_the_step_half_done() -> None:
    expected, plain, _, _ = small(torch.optim.Adam)
    plain.step()

    def fail(name: str, step: int, params: list) -> None:
        calls.append(name)
        if name == "1":
            raise KeyError("mine")

    calls: list[str] = []
    model, base, optimizer, recorder = small(torch.optim.Adam, callback=fail)
    with pytest.raises(KeyError, match="mine"):
        optimizer.step()
    assert calls == ["2", "1", "0"]  # the later ones as well: they are of this step
    assert recorder.named("layer") == ["2", "1", "0"]
    assert recorder.events[-1] == ("after_step", True)
    assert same(model, base, expected, plain)
    with pytest.raises(KeyError):
        optimizer.step()
    assert calls == ["2", "1", "0", "2", "1", "0"]


def test_an_observer_that_raises_at_a_hand_over_does_not_leave_the_step_half_done() -> None:
    expected, plain, _, _ = small()
    plain.step()
    model, base, optimizer, recorder = small()
    recorder.raises["layer", "1"] = OSError("disk")
    with pytest.raises(OSError, match="disk"):
        optimizer.step()
    assert recorder.named("layer") == ["2", "1"]
    assert recorder.events[-1] == ("after_step", True)
    assert same(model, base, expected, plain)


def test_errors_of_callback_and_observer_in_one_step_are_both_shown() -> None:
    def fail(*args: object) -> None:
        raise KeyError("callback")

    _, _, optimizer, recorder = small(callback=fail)
    recorder.raises["layer", "0"] = OSError("observer")
    with pytest.raises(KeyError) as caught:
        optimizer.step()
    assert isinstance(caught.value.__context__, OSError)


def test_the_first_error_of_a_callback_is_raised_and_the_others_are_shown_once() -> None:
    errors = iter([OSError("an older one"), OSError("an older one"), ValueError("a new one")])

    def fail(*args: object) -> None:
        raise next(errors)

    _, _, optimizer, _ = small(callback=fail)
    with pytest.raises(OSError, match="an older one") as caught:
        optimizer.step()
    assert next(errors, None) is None
    shown = caught.value.__context__
    assert isinstance(shown, ValueError)
    assert shown.__context__ is None


def test_a_callback_may_raise_the_same_error_for_every_layer() -> None:
    error = OSError("kept")

    def fail(*args: object) -> None:
        raise error

    _, _, optimizer, _ = small(callback=fail)
    with pytest.raises(OSError, match="kept") as caught:
        optimizer.step()
    assert caught.value is error
    assert error.__context__ is None


# --- errors in the step itself ---------------------------------------------------------------


def test_an_update_that_raises_aborts_the_step_and_leaves_the_groups_as_they_were() -> None:
    model, base, optimizer, recorder = small(torch.optim.Adam)
    groups = base.param_groups
    group = groups[0]
    before = dict(group)
    model[1].weight.grad = torch.ones(3, 3).to_sparse()  # Adam refuses it
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    assert recorder.events[-2:] == [("gate", "1"), ("abort", "RuntimeError")]
    assert base.param_groups is groups
    assert groups == [group]
    assert group == before
    assert group["params"] is before["params"]
    assert not optimizer.stepping
    assert optimizer.training_step == 0


def test_a_callbacks_error_is_shown_with_that_of_the_update_that_followed_it() -> None:
    def fail(*args: object) -> None:
        raise KeyError("callback")

    model, _, optimizer, _ = small(torch.optim.Adam, callback=fail)
    model[0].weight.grad = torch.ones(3, 3).to_sparse()
    with pytest.raises(RuntimeError, match="sparse") as caught:
        optimizer.step()
    assert isinstance(caught.value.__context__, KeyError)


@pytest.mark.parametrize("place", ["pre", "closure", "gate", "post"])
def test_an_error_of_hook_closure_or_gate_aborts_the_step(place) -> None:
    def fail(*args: object) -> None:
        raise ZeroDivisionError

    _, _, optimizer, recorder = small()
    if place == "gate":
        recorder.raises["gate", "1"] = ZeroDivisionError()
    elif place != "closure":
        getattr(optimizer, f"register_step_{place}_hook")(fail)
    with pytest.raises(ZeroDivisionError):
        optimizer.step(*([fail] if place == "closure" else []))
    assert recorder.events[-1] == ("abort", "ZeroDivisionError")
    assert recorder.named("after_step") == []


def test_an_error_before_the_step_stops_it_before_anything_has_changed() -> None:
    _, _, optimizer, recorder = small()
    recorder.raises["before_step"] = OSError("of an earlier checkpoint")
    with pytest.raises(OSError, match="earlier"):
        optimizer.step()
    assert recorder.events == ["before_step"]


# --- closures and hooks ----------------------------------------------------------------------


@pytest.mark.parametrize("way", ["fast", "layerwise", "whole"])
@pytest.mark.parametrize("keyword", [False, True])
def test_a_closure_is_evaluated_once_with_gradients_enabled_and_its_loss_returned(
    way, keyword
) -> None:
    _, base, optimizer, recorder = small()
    if way == "whole":
        optimizer = LayerwiseOptimizer(base, [], optimizer.layers, layerwise=False)
        optimizer._observer = recorder
    recorder.wants = way != "fast"
    enabled = []

    def closure() -> str:
        enabled.append(torch.is_grad_enabled())
        return "loss"

    with torch.no_grad():
        loss = optimizer.step(closure=closure) if keyword else optimizer.step(closure)
    assert loss == "loss"
    assert enabled == [True]
    assert optimizer.get_statistics()[f"{way}_steps"] == 1


def test_a_closure_computes_the_gradients_that_the_update_uses() -> None:
    def run(by_layer: bool) -> object:
        model, base, optimizer, _ = small(torch.optim.Adam)
        chosen = optimizer if by_layer else base

        def closure() -> torch.Tensor:
            chosen.zero_grad()
            loss = model(torch.ones(2, 3)).sum()
            loss.backward()
            return loss

        losses = [chosen.step(closure).item() for _ in range(3)]
        return losses, raw_bytes(model.state_dict())

    assert run(True) == run(False)


def test_arguments_that_the_base_does_not_take_are_refused() -> None:
    _, _, optimizer, _ = small()
    with pytest.raises(TypeError, match=r"step.*foo"):
        optimizer.step(foo=1)


@pytest.mark.parametrize("wants", [True, False], ids=["layerwise", "fast"])
@pytest.mark.parametrize("layerwise", [None, False], ids=["by-layer", "never-by-layer"])
def test_hooks_of_wrapper_base_and_all_optimizers_run_once_a_step(wants, layerwise) -> None:
    model, base, _, _ = small()
    optimizer = wrap(base, model, layerwise=layerwise)
    optimizer._observer = Recorder(wants)
    calls = []

    def hook(name: str) -> Callable:
        def run(which: Optimizer, args: tuple, kwargs: dict) -> None:
            assert args == (which,)
            assert kwargs == {}
            calls.append((name, which))

        return run

    optimizer.register_step_pre_hook(hook("pre"))
    optimizer.register_step_post_hook(hook("post"))
    base.register_step_pre_hook(hook("pre"))
    base.register_step_post_hook(hook("post"))
    with (
        removing(register_optimizer_step_pre_hook(hook("global pre"))),
        removing(register_optimizer_step_post_hook(hook("global post"))),
    ):
        optimizer.step()
    assert calls == [
        ("pre", optimizer), ("global pre", base), ("pre", base),
        ("post", base), ("global post", base), ("post", optimizer),
    ]  # fmt: skip


def test_hooks_run_once_where_the_base_is_stepped_through_its_own_step() -> None:
    _, base, optimizer = foreign()
    calls = []
    for which in (optimizer, base):
        which.register_step_pre_hook(lambda which, *_: calls.append(("pre", which)))
        which.register_step_post_hook(lambda which, *_: calls.append(("post", which)))
    with removing(
        register_optimizer_step_post_hook(lambda which, *_: calls.append(("all", which)))
    ):
        optimizer.step()
    assert calls == [
        ("pre", optimizer), ("pre", base), ("post", base), ("all", base), ("post", optimizer),
    ]  # fmt: skip


def test_pre_hooks_may_replace_the_arguments() -> None:
    _, base, optimizer, _ = small()
    optimizer.register_step_pre_hook(lambda which, args, kwargs: ((which, lambda: "first"), {}))
    assert optimizer.step() == "first"
    seen = []

    def second(which: Optimizer, args: tuple, kwargs: dict) -> tuple:
        seen.append(args[1]())
        return (which,), {"closure": lambda: "second"}

    base.register_step_pre_hook(second)
    assert optimizer.step() == "second"
    assert seen == ["first"]
    base.register_step_pre_hook(lambda *_: "nonsense")
    with pytest.raises(RuntimeError, match="pre-hook must return"):
        optimizer.step()


@pytest.mark.parametrize("owner", ["wrapper", "base", "global"])
def test_layers_are_handed_over_after_the_post_hooks_which_may_change_them(owner) -> None:
    model, base, optimizer, recorder = small()

    def double(*args: object) -> None:
        recorder.note("hook")
        with torch.no_grad():
            for param in model.parameters():
                param.mul_(2)

    register = {
        "wrapper": optimizer.register_step_post_hook,
        "base": base.register_step_post_hook,
        "global": register_optimizer_step_post_hook,
    }[owner]
    with removing(register(double)):
        optimizer.step()
    assert recorder.events[1:] == [
        ("gate", "2"), ("gate", "1"), ("gate", "0"), "hook",
        ("layer", "2"), ("layer", "1"), ("layer", "0"), ("after_step", True),
    ]  # fmt: skip
    assert recorder.weights[-1] == raw_bytes(model.state_dict())
    recorder.events.clear()
    optimizer.step()
    assert recorder.events[1:3] == [("gate", "2"), ("layer", "2")]


def test_a_step_is_marked_once_for_the_profiler() -> None:
    _, _, optimizer, _ = small()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer.step()
    marks = [event.name for event in profile.events() if event.name.startswith("Optimizer.step#")]
    assert marks == ["Optimizer.step#LayerwiseOptimizer.step"]


def test_hooks_can_see_that_they_run_inside_a_layerwise_step() -> None:
    _, base, optimizer, _ = small()
    seen = []
    base.register_step_pre_hook(lambda *_: seen.append(optimizer.stepping))
    optimizer.step()
    base.step()
    assert seen == [True, False]


# --- schedulers and scalers ------------------------------------------------------------------


@pytest.mark.parametrize("on", ["wrapper", "base"])
@pytest.mark.parametrize("wants", [True, False], ids=["layerwise", "fast"])
def test_a_scheduler_made_on_either_optimizer_works_without_warnings(on, wants) -> None:
    _, base, optimizer, recorder = small()
    recorder.wants = wants
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler = torch.optim.lr_scheduler.ExponentialLR(
            optimizer if on == "wrapper" else base, gamma=0.5
        )
        for _ in range(3):
            optimizer.step()
            scheduler.step()
    assert base.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"] == 0.1 * 0.5**3
    assert optimizer.get_statistics()["layerwise_steps"] == (3 if wants else 0)


@pytest.mark.parametrize("by_layer", [True, False], ids=["layerwise", "fast"])
@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.SGD])
def test_a_step_that_a_gradient_scaler_voids_changes_nothing_and_is_not_counted(
    kind, fused, unscale, by_layer
) -> None:
    def run(wrapped: bool) -> tuple:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
        optimizer = base = kind(model.parameters(), lr=0.01, fused=fused)
        recorder = Recorder(wants=by_layer)
        if wrapped:
            optimizer = wrap(base, model)
            optimizer._observer = recorder
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
        scales = []
        for step in range(6):
            optimizer.zero_grad()
            scaler.scale(model(torch.randn(4, 3)).square().mean()).backward()
            if step == 3:
                model[0].weight.grad[0, 0] = float("inf")
            if unscale:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            before = raw_bytes(model.state_dict())
            scaler.step(optimizer)
            assert (before == raw_bytes(model.state_dict())) == (step == 3)
            scaler.update()
            scales.append(scaler.get_scale())
        assert not hasattr(optimizer, "found_inf")
        assert not hasattr(base, "grad_scale")
        return (
            raw_bytes(model.state_dict()),
            raw_bytes(base.state_dict()),
            scales,
            recorder,
            optimizer,
        )

    expected = run(wrapped=False)
    found = run(wrapped=True)
    assert found[:3] == expected[:3]
    recorder, optimizer = found[3:]
    assert optimizer.training_step == 5
    assert recorder.named("after_step") == [True] * 3 + ([False] if fused else []) + [True] * 2
    assert len(recorder.named("layer")) == (10 if by_layer else 0)
    assert optimizer.get_statistics()["voided_steps"] == int(fused)


def test_callbacks_do_not_hear_of_a_voided_step() -> None:
    calls = []
    _, _, optimizer, recorder = small(
        torch.optim.Adam, callback=lambda *args: calls.append(args[:2]), fused=True
    )
    optimizer.found_inf, optimizer.grad_scale = torch.tensor(2.0), None
    hooks = []
    optimizer.register_step_post_hook(lambda *_: hooks.append(1))
    optimizer.step()
    assert calls == []
    assert hooks == [1]
    assert recorder.events == ["before_step", ("after_step", False)]
    del optimizer.found_inf, optimizer.grad_scale
    optimizer.step()
    assert calls == [("2", 1), ("1", 1), ("0", 1)]


# --- optimizers that are stepped whole -------------------------------------------------------


class Foreign(Optimizer):
    """Somebody's optimizer: writes through `.data` and counts its calls in its group."""

    def __init__(self, params: object, lr: float = 0.5) -> None:
        super().__init__(params, {"lr": lr, "calls": 0})

    def step(self, closure: Callable | None = None, extra: float = 0.0) -> object:
        for group in self.param_groups:
            group["calls"] += 1
            for param in group["params"]:
                if param.grad is not None:
                    param.data = param.data - group["lr"] * param.grad + extra
        return closure() if closure is not None else None


def foreign() -> tuple[nn.Module, Foreign, LayerwiseOptimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    base = Foreign(model.parameters())
    with pytest.warns(UserWarning, match="Foreign is stepped whole"):
        optimizer = wrap(base, model)
    optimizer._observer = Recorder(watch=model)
    model(torch.randn(3, 2)).sum().backward()
    return model, base, optimizer


def test_a_foreign_optimizer_is_stepped_whole_and_its_layers_are_handed_over_afterwards() -> None:
    model, base, optimizer = foreign()
    recorder = optimizer._observer
    assert optimizer.step(extra=1.0) is None
    assert recorder.events == [
        "before_step", ("gate", None), ("layer", "1"), ("layer", "0"), ("after_step", True),
    ]  # fmt: skip
    assert recorder.weights[1] == recorder.weights[0]
    assert recorder.weights[2] == recorder.weights[-1] == raw_bytes(model.state_dict())
    assert base.param_groups[0]["calls"] == 1
    statistics = optimizer.get_statistics()
    assert statistics["stepped_whole"] is True
    assert statistics["whole_steps"] == 1


def test_a_whole_steps_updates_show_in_version_counters_when_its_layers_are_handed_over() -> None:
    model, _, optimizer = foreign()
    model[1].bias.grad = None
    before = [param._version for param in model.parameters()]
    seen = {}
    optimizer._observer.after_layer = lambda layer: seen.update(
        {layer: [p._version > v for p, v in zip(model.parameters(), before, strict=True)]}
    )
    optimizer.step()
    assert seen == {"1": [False, False, True, False], "0": [True, True, True, False]}


def test_an_optimizer_that_never_called_torchs_constructor_can_be_the_base() -> None:
    class Outer(Optimizer):
        """As libraries wrap an optimizer: an Optimizer by name, with none of its attributes."""

        def __init__(self, inner: Optimizer) -> None:
            self.inner = inner

        param_groups = property(lambda self: self.inner.param_groups)
        state = property(lambda self: self.inner.state)
        defaults = property(lambda self: self.inner.defaults)

        def step(self, closure: Callable | None = None) -> object:
            return self.inner.step(closure)

    expected, plain, _, _ = small(torch.optim.Adam)
    plain.step()
    model, base, _, recorder = small(torch.optim.Adam)
    with pytest.warns(UserWarning, match="Outer is stepped whole"):
        optimizer = wrap(Outer(base), model)
    optimizer._observer = recorder
    optimizer.step()
    assert recorder.named("layer") == ["2", "1", "0"]
    assert same(model, base, expected, plain)


def test_lbfgs_is_stepped_whole_with_callbacks_and_equals_its_own_step() -> None:
    def run(wrapped: bool) -> tuple:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
        optimizer = torch.optim.LBFGS(model.parameters(), max_iter=4, line_search_fn="strong_wolfe")
        calls = []
        if wrapped:
            with pytest.warns(UserWarning, match="LBFGS is stepped whole"):
                optimizer = wrap(
                    optimizer, model, lambda *args: calls.append((*args[:2], raw_bytes(args[2])))
                )
        x = torch.randn(8, 3)

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = (model(x) - 1).square().mean()
            loss.backward()
            return loss

        losses = [optimizer.step(closure).item() for _ in range(3)]
        return losses, raw_bytes(model.state_dict()), calls, layers_of(model)

    expected = run(False)
    found = run(True)
    assert found[:2] == expected[:2]
    calls, layers = found[2:]
    assert [call[:2] for call in calls] == [(name, n) for n in (1, 2, 3) for name in ("1", "0")]
    assert calls[-1][2] == raw_bytes(layers["0"])


def test_a_subclass_of_a_known_type_is_not_presumed_to_be_steppable_by_layer() -> None:
    class MyAdam(torch.optim.Adam):
        pass

    with pytest.warns(UserWarning, match="MyAdam is stepped whole"):
        _, _, optimizer, _ = small(MyAdam)
    optimizer.step()
    assert optimizer.get_statistics()["whole_steps"] == 1


def test_a_type_of_ones_own_is_stepped_by_layer_when_it_is_vouched_for() -> None:
    class MyAdam(torch.optim.Adam):
        pass

    model, base, _, _ = small(torch.optim.Adam)
    base.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mine, my_base, _, recorder = (
            (m := small(torch.optim.SGD))[0],
            MyAdam(m[0].parameters(), lr=0.1),
            *m[2:],
        )
        optimizer = wrap(my_base, mine, layerwise=True)
        optimizer._observer = recorder
        optimizer.step()
    assert recorder.named("gate") == ["2", "1", "0"]
    assert same(mine, optimizer, model, base)


def test_layerwise_false_steps_a_known_type_whole_without_a_warning() -> None:
    model, base, _, recorder = small()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = wrap(base, model, layerwise=False)
        optimizer._observer = recorder
        optimizer.step()
    assert recorder.named("gate") == [None]
    assert recorder.named("layer") == ["2", "1", "0"]


def test_known_optimizers_are_stepped_by_layer_without_a_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, _, optimizer, _ = small()
        optimizer.step()
    assert optimizer.get_statistics()["stepped_whole"] is False


def test_a_step_method_replaced_on_the_base_is_respected_and_announced_once() -> None:
    _, base, optimizer, recorder = small()
    original = base.step
    calls = []

    def mine(self: Optimizer, closure: Callable | None = None) -> object:
        calls.append(self)
        return original(closure)

    base.step = types.MethodType(mine, base)
    with pytest.warns(UserWarning, match="SGD is stepped whole.*replaced") as caught:
        optimizer.step()
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
    assert calls == [base, base]
    assert recorder.named("gate") == [None, None]


def test_a_replaced_steps_updates_show_in_version_counters() -> None:
    model, base, optimizer, recorder = small()

    def mine(self: Optimizer, closure: Callable | None = None) -> None:
        for parameter in model.parameters():
            parameter.data.add_(1.0)  # behind the counter's back

    base.step = types.MethodType(mine, base)
    before = [p._version for p in model.parameters()]
    seen = []
    recorder.after_layer = lambda layer: seen.append([p._version for p in model.parameters()])
    with pytest.warns(UserWarning, match="replaced"):
        optimizer.step()
    assert all(now > then for now, then in zip(seen[-1], before, strict=True))


# --- a real torch.optim.Optimizer ------------------------------------------------------------


def test_groups_state_and_defaults_are_the_bases_own_even_after_loading() -> None:
    _, base, optimizer, _ = small(torch.optim.Adam)
    assert isinstance(optimizer, Optimizer)
    optimizer.step()
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert optimizer.param_groups is base.param_groups
    assert optimizer.state is base.state
    assert optimizer.defaults is base.defaults
    optimizer.param_groups[0]["lr"] = 0.7
    assert base.param_groups[0]["lr"] == 0.7


def test_a_state_dict_goes_from_base_to_wrapper_and_back() -> None:
    kind = torch.optim.AdamW
    expected = net()
    plain = kind(groups_of(expected, kind))
    train(expected, plain, range(3))

    model = net()
    model.load_state_dict(expected.state_dict())
    optimizer = wrap(kind(groups_of(model, kind)), model, ignore)
    optimizer.load_state_dict(copy.deepcopy(plain.state_dict()))
    train(expected, plain, range(3, 6))
    train(model, optimizer, range(3, 6))
    assert same(model, optimizer, expected, plain)

    fresh = kind(groups_of(expected, kind))
    fresh.load_state_dict(optimizer.state_dict())
    assert raw_bytes(fresh.state_dict()) == raw_bytes(plain.state_dict())


def test_state_dict_hooks_of_wrapper_and_base_run_once_each() -> None:
    _, base, optimizer, _ = small()
    calls = []

    def note(name: str, result: object = None) -> Callable:
        def hook(which: Optimizer, *args: object) -> object:
            calls.append((name, which))
            return result

        return hook

    for which in (optimizer, base):
        which.register_state_dict_pre_hook(note("save pre"))
        which.register_state_dict_post_hook(note("save post"))
        which.register_load_state_dict_pre_hook(note("load pre"))
        which.register_load_state_dict_post_hook(note("load post"))
    saved = optimizer.state_dict()
    optimizer.load_state_dict(saved)
    assert calls == [
        ("save pre", optimizer), ("save pre", base), ("save post", base), ("save post", optimizer),
        ("load pre", optimizer), ("load pre", base), ("load post", base), ("load post", optimizer),
    ]  # fmt: skip
    replaced = {**saved, "param_groups": [{**saved["param_groups"][0], "lr": 42.0}]}
    optimizer.register_state_dict_post_hook(note("", {"replaced": True}))
    optimizer.register_load_state_dict_pre_hook(note("", replaced))
    assert optimizer.state_dict() == {"replaced": True}
    optimizer.load_state_dict(saved)
    assert base.param_groups[0]["lr"] == 42.0


@pytest.mark.parametrize("on", ["wrapper", "base"])
def test_added_parameters_are_updated_in_a_last_layer_of_their_own(on) -> None:
    _, base, optimizer, recorder = small()
    optimizer.step()
    added = nn.Parameter(torch.ones(1))
    (optimizer if on == "wrapper" else base).add_param_group({"params": [added], "lr": 0.5})
    added.grad = torch.ones(1)
    recorder.events.clear()
    optimizer.step()
    assert recorder.named("layer") == ["2", "1", "0", "unlisted"]
    assert added.item() == 0.5


def test_zero_grad_is_the_bases() -> None:
    model, _, optimizer, _ = small()
    optimizer.zero_grad(set_to_none=False)
    assert all((p.grad == 0).all() for p in model.parameters())
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("how", ["pickle", "deepcopy"])
def test_a_copy_goes_on_where_the_original_stood(how) -> None:
    kind = torch.optim.AdamW
    model = net()
    optimizer = wrap(kind(groups_of(model, kind)), model, ignore, use_pinned_memory=False)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)  # replaces the instance's step
    optimizer._observer = Recorder()
    train(model, optimizer, range(3), scheduler)

    pair = (model, optimizer)
    copied, other = pickle.loads(pickle.dumps(pair)) if how == "pickle" else copy.deepcopy(pair)
    assert other._observer is None
    assert other.training_step == 3
    assert other.base_optimizer is not optimizer.base_optimizer
    assert list(other.layers) == list(optimizer.layers)
    calls = []
    other.callback = lambda name, step, params: calls.append((name, step))
    other.register_step_pre_hook(lambda *_: calls.append("pre"))
    other.register_step_post_hook(lambda *_: calls.append("post"))
    train(model, optimizer, range(3, 6))
    assert not same(copied, other, model, optimizer)
    train(copied, other, range(3, 6))
    assert same(copied, other, model, optimizer)
    assert calls[0] == "pre"
    assert calls[1 : len(other.layers) + 1] == [(name, 4) for name in reversed(layers_of(copied))]
    assert other.get_statistics()["layerwise_steps"] == 6


def test_repr_shows_the_base_and_how_it_is_stepped() -> None:
    _, base, optimizer, _ = small()
    assert repr(optimizer) == f"LayerwiseOptimizer (3 layers, stepped by layer) of {base!r}"


def test_verbose_prints_the_update_order(capsys) -> None:
    model, base, _, _ = small()
    wrap(base, model, verbose=True)
    assert capsys.readouterr().out == "LayerwiseOptimizer: update order 2, 1, 0\n"


def test_statistics_count_steps_by_kind_and_the_time_in_them() -> None:
    _, _, optimizer, recorder = small(callback=ignore)
    optimizer.step()
    optimizer.callback, recorder.wants = None, False
    optimizer.step()
    statistics = optimizer.get_statistics()
    seconds = [statistics.pop(name) for name in ("gate_s", "callback_s", "step_s")]
    assert statistics == {
        "steps": 2, "layerwise_steps": 1, "fast_steps": 1, "whole_steps": 0, "voided_steps": 0,
        "layers": 3, "stepped_whole": False,
    }  # fmt: skip
    assert 0 < sum(seconds[:2]) < seconds[2]


# --- arguments -------------------------------------------------------------------------------


PARAM = nn.Parameter(torch.ones(1))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"base_optimizer": "adam"}, TypeError, "base_optimizer.*got str"),
        ({"callback": 3}, TypeError, "callback.*got int"),
        ({"layerwise": 1}, TypeError, "layerwise.*got int"),
        ({"layer_params_dict": [PARAM]}, TypeError, "layer_params_dict.*got list"),
        ({"layer_params_dict": {1: [PARAM]}}, TypeError, "layer_params_dict.*got int"),
        ({"layer_params_dict": {"a": PARAM}}, TypeError, r"layer_params_dict\['a'\].*a tensor"),
        ({"layer_params_dict": {"a": 7}}, TypeError, r"layer_params_dict\['a'\].*got int"),
        ({"layer_params_dict": {"a": ["w"]}}, TypeError, r"layer_params_dict\['a'\].*got str"),
        ({"update_order": "a"}, TypeError, "update_order.*'a'"),
        ({"update_order": 5}, TypeError, "update_order.*got int"),
        ({"update_order": [5]}, TypeError, "update_order.*got int"),
        ({"update_order": ["a", "b"]}, ValueError, "update_order.*'b'"),
        ({"update_order": ["a", "a"]}, ValueError, "update_order.*'a' is listed twice"),
        (
            {"base_optimizer": torch.optim.LBFGS([PARAM]), "layerwise": True},
            ValueError,
            "layerwise.*LBFGS",
        ),
    ],
)
def test_arguments_that_do_not_fit_are_refused_by_name(change, error, message) -> None:
    arguments = {
        "base_optimizer": torch.optim.SGD([PARAM], lr=1.0),
        "update_order": ["a"],
        "layer_params_dict": {"a": [PARAM]},
    }
    with pytest.raises(error, match=message):
        LayerwiseOptimizer(**{**arguments, **change})


def test_an_order_that_is_refused_leaves_the_old_one() -> None:
    _, _, optimizer, recorder = small()
    with pytest.raises(ValueError, match="nowhere"):
        optimizer.set_update_order(["nowhere"], {})
    optimizer.step()
    assert recorder.named("layer") == ["2", "1", "0"]
