"""A torn state is never committed: no layer changes before it is staged, and what else changes one
is found. Copies are held back until a test lets them go; they read the live tensors that late."""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from _models import LITTLE_MEMORY, Plain, Stream, Zoo, assert_same, memory_directory
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer
from torch.optim.swa_utils import AveragedModel

from pccheck_ext import _C, CheckpointError, LayerwiseCheckpointTrainer, ModelRecovery

DEADLINE_S = 30.0


@pytest.fixture
def directory() -> Iterator[Path]:
    with memory_directory() as path:
        yield path


def eventually(happened: Callable[[], object], what: str) -> None:
    """Returns when it has happened; fails where it does not."""
    until = time.monotonic() + DEADLINE_S
    pause = threading.Event()
    while not happened():
        assert time.monotonic() < until, f"it never happened: {what}"
        pause.wait(0.0005)


class Running(threading.Thread):
    """A call that is under way in a thread."""

    def __init__(self, call: Callable[[], object]) -> None:
        super().__init__(daemon=True)
        self._call = call
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._call()
        except BaseException as error:
            self.error = error

    def end(self) -> None:
        self.join(DEADLINE_S)
        assert not self.is_alive(), "the call never returned"
        if self.error is not None:
            raise self.error


class Held:
    """A trainer whose copies are held back, and a record of how its gates were passed."""

    def __init__(
        self,
        directory: Path,
        model: Callable[[], nn.Module] = Plain,
        optimizer: Callable[[nn.Module], Optimizer] | None = None,
        hold: bool = True,
        **options: Any,
    ) -> None:
        torch.manual_seed(0)
        self.directory = directory
        self.model = model()
        make = optimizer or (lambda m: torch.optim.Adam(m.parameters(), lr=0.01))
        self.trainer = LayerwiseCheckpointTrainer(
            self.model,
            make(self.model),
            checkpoint_dir=directory,
            _manual_copier=True,
            **{**LITTLE_MEMORY, "keep_last": 0, **options},
        )
        self.session = self.trainer._session
        self.data = Stream()
        self.released: float = 0
        self.arrived: list[str | None] = []  # layers at their gates
        self.passed: list[tuple[str | None, float]] = []  # and how many copies had ended then
        self.after: dict[int, dict[str, Tensor]] = {}  # the model after each step
        gate = self.trainer._saver.before_update

        def watched(layer: str | None) -> None:
            self.arrived.append(layer)
            gate(layer)
            self.passed.append((layer, self.released))

        self.trainer._saver.before_update = watched  # type: ignore[method-assign]
        if not hold:
            self.release_all()

    def release(self, count: int) -> None:
        self.released += count
        self.session.release_copies(count)

    def release_all(self) -> None:
        self.released = float("inf")
        self.session.release_all_copies()

    def backward(self) -> None:
        tokens, targets = next(self.data)
        nn.functional.cross_entropy(self.model(tokens), targets).backward()

    def step(self) -> None:
        self.trainer.zero_grad()
        self.backward()
        self.trainer.step()
        self.after[self.trainer.training_step] = self.values()

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.step()
        self.trainer.wait()

    def values(self) -> dict[str, Tensor]:
        return {name: t.detach().clone() for name, t in self.model.state_dict().items()}

    def on_disk(self, step: int, file: str = "model", **inside: Any) -> dict[str, Tensor]:
        return load_file(self.directory / f"step-{step:08d}" / f"{file}.safetensors")

    def assert_committed(self, *steps: int) -> None:
        """Exactly these steps, each as the model was."""
        self.release_all()
        self.trainer.shutdown()
        found = ModelRecovery(self.directory).list_checkpoints()
        assert found == [f"step-{step:08d}" for step in steps]
        for step in steps:
            stored = self.on_disk(step)
            assert_same(stored, {name: self.after[step][name] for name in stored}, f"step {step}")


@pytest.fixture
def held(directory: Path) -> Iterator[Callable[..., Held]]:
    made: list[Held] = []

    def make(**options: Any) -> Held:
        made.append(Held(directory, **options))
        return made[-1]

    yield make
    for each in made:  # whatever the test came to, nothing waits for copies any more
        if each.trainer._session.is_open:
            each.release_all()
            with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
                warnings.simplefilter("ignore")
                patch.setattr(each.trainer._saver.flight, "on_error", "warn")
                each.trainer.shutdown()


# --- The gate, by every path ---------------------------------------------------------------------


def by_layer(held: Held) -> None:
    held.step()


def whole(held: Held) -> None:
    held.trainer.zero_grad()
    held.backward()
    held.trainer.step()


def by_the_base(held: Held) -> None:
    held.trainer.zero_grad()
    held.backward()
    held.trainer.optimizer.base_optimizer.step()


def by_another_optimizer(held: Held) -> None:
    held.trainer.zero_grad()
    held.backward()
    torch.optim.SGD([held.model.hidden.weight], lr=1.0).step()


def by_another_optimizer_in_the_closure(held: Held) -> None:
    def closure() -> None:
        by_another_optimizer(held)

    held.trainer.optimizer.step(closure)


@pytest.mark.parametrize(
    ("change", "every"),
    [
        (by_layer, 1),
        (whole, 2),
        (by_the_base, 1),
        (by_the_base, 2),
        (by_another_optimizer, 1),
        (by_another_optimizer_in_the_closure, 1),
    ],
)
def test_nothing_is_updated_before_it_is_staged(
    change: Callable[[Held], None], every: int, held: Callable[..., Held]
) -> None:
    case = held(checkpoint_every=every)
    for _ in range(every):
        case.step()
    case.arrived.clear()
    case.passed.clear()
    running = Running(lambda: change(case))
    eventually(lambda: case.arrived, "the update is at its gate")
    eventually(lambda: case.session.copies_submitted() > 0, "a copy is under way")
    assert running.is_alive()
    assert not case.passed
    assert_same(case.values(), case.after[every])
    case.release_all()
    running.end()
    assert all(released for _, released in case.passed)
    assert not torch.equal(case.model.hidden.weight, case.after[every]["hidden.weight"])
    case.trainer.wait()
    stored = case.on_disk(every)
    assert_same(stored, {name: case.after[every][name] for name in stored})
    state = case.on_disk(every, "optimizer")
    assert state["hidden.weight.step"] == every


def test_each_layer_waits_for_its_own_copy_and_for_no_other(held: Callable[..., Held]) -> None:
    case = held()
    case.step()
    order = case.trainer.update_order
    assert order == ["out", "hidden", "embed"]
    running = Running(case.step)
    for i, layer in enumerate(order):
        eventually(lambda i=i: len(case.arrived) == 2 + i, f"{layer} is at its gate")
        assert case.arrived[1:] == order[: i + 1]
        now = case.values()
        for name, value in case.after[1].items():
            updated = order.index(name.partition(".")[0]) < i
            assert torch.equal(now[name], value) != updated, name
        case.release(1)
    running.end()
    layers = [layer for layer, _ in case.passed[1:]]
    assert layers == order
    assert [released for _, released in case.passed[1:]] == [1, 2, 3]
    case.assert_committed(1, 2)


def test_a_parameter_that_only_the_optimizer_knows_has_its_gate(held: Callable[..., Held]) -> None:
    outside = nn.Parameter(torch.tensor([1.0, 2.0]))

    class Model(Plain):
        def forward(self, tokens: Tensor) -> Tensor:
            return super().forward(tokens) * outside.prod()

    def optimizer(model: nn.Module) -> Optimizer:
        return torch.optim.SGD([{"params": model.parameters()}, {"params": [outside]}], lr=0.1)

    case = held(model=Model, optimizer=optimizer)
    case.step()
    before = outside.detach().clone()
    layers = len(case.trainer.update_order)
    running = Running(case.step)
    case.release(layers - 1)  # every layer's but the last one's, which is the parameter's
    eventually(lambda: len(case.arrived) == 1 + layers, "the last layer is at its gate")
    assert torch.equal(outside, before)
    case.release(1)
    running.end()
    assert not torch.equal(outside, before)
    case.release_all()
    case.trainer.wait()
    assert_same(case.on_disk(1, "optimizer")["(optimizer).1.0"], before)
    case.assert_committed(1, 2)


def test_a_step_that_takes_no_checkpoint_waits_only_where_one_is_still_read(
    held: Callable[..., Held],
) -> None:
    case = held(checkpoint_every=3)
    case.step()
    case.step()
    assert case.session.copies_submitted() == 0
    case.step()
    running = Running(case.step)
    eventually(lambda: case.session.copies_submitted() > 0, "the third step's copy")
    case.release_all()
    running.end()
    case.step()
    case.assert_committed(3)


def test_without_the_gate_the_tripwire_finds_the_torn_layer(held: Callable[..., Held]) -> None:
    """The bug that these tests are about, planted."""
    case = held()
    case.step()
    case.trainer._saver.before_update = lambda layer: None  # type: ignore[method-assign]
    case.step()
    case.release_all()
    with pytest.raises(CheckpointError, match=r"step-00000001 failed: tensor '[\w.]+' was changed"):
        case.trainer.wait()
    assert ModelRecovery(case.directory).list_checkpoints() in ([], ["step-00000002"])


@pytest.mark.parametrize("mode", [{"foreach": True}, {"foreach": False}, {"fused": True}])
def test_the_tripwire_sees_the_updates_of_every_kernel(
    mode: dict[str, bool], held: Callable[..., Held]
) -> None:
    case = held(optimizer=lambda m: torch.optim.Adam(m.parameters(), lr=0.01, **mode))
    case.step()
    case.trainer._saver.before_update = lambda layer: None  # type: ignore[method-assign]
    case.step()
    case.release_all()
    with pytest.raises(CheckpointError, match="was changed in place"):
        case.trainer.wait()


# --- What goes on while nothing is staged --------------------------------------------------------


def test_forwards_backwards_and_cleared_gradients_change_nothing_that_is_saved(
    held: Callable[..., Held],
) -> None:
    case = held(model=Zoo, save_gradients=True)
    case.step()
    wanted = {n: p.grad.clone() for n, p in case.model.named_parameters() if p.grad is not None}
    case.trainer.optimizer.zero_grad(set_to_none=False)
    for _ in range(3):
        case.backward()  # statistics, gradients
    case.trainer.optimizer.zero_grad()
    assert not torch.equal(case.model.norm.running_mean, case.after[1]["norm.running_mean"])
    case.release_all()
    case.trainer.wait()
    assert_same(case.on_disk(1, "gradients"), wanted)
    case.assert_committed(1)


def test_objects_in_extra_may_change_once_the_step_is_sealed(held: Callable[..., Held]) -> None:
    model = Plain()
    average = AveragedModel(model)
    case = held(model=lambda: model, extra={"average": average, "loader": Stream()})
    case.step()
    average.update_parameters(model)
    wanted = [p.detach().clone() for p in average.parameters()]
    case.trainer.end_step()
    average.update_parameters(model)
    with torch.no_grad():
        for p in average.parameters():
            p.fill_(7.0)
    case.release_all()
    case.trainer.wait()
    stored = case.on_disk(1, "extra")
    found = [stored[f"extra.average.{name}"] for name, _ in average.named_parameters()]
    assert_same(found, wanted)
    case.assert_committed(1)


def test_parameters_that_share_memory_may_change_at_different_times(
    held: Callable[..., Held],
) -> None:
    class Flat(Plain):
        def __init__(self) -> None:
            super().__init__()
            base = torch.randn(self.hidden.weight.numel() + self.out.bias.numel())
            split = self.hidden.weight.numel()
            self.hidden.weight = nn.Parameter(base[:split].view_as(self.hidden.weight))
            self.out.bias = nn.Parameter(base[split:])

    case = held(model=Flat)
    case.step()
    running = Running(case.step)
    eventually(lambda: len(case.arrived) == 2, "the first layer is at its gate")
    case.release_all()
    running.end()
    case.step()
    case.assert_committed(1, 2, 3)


def test_regrouping_the_layers_between_two_steps_tears_nothing(held: Callable[..., Held]) -> None:
    case = held(hold=False)
    case.step()
    case.step()
    layers = case.trainer.optimizer.layers
    regrouped = {
        "hidden": [*layers["hidden"], layers["embed"][0]],
        "fresh": layers["out"],
    }
    case.trainer.optimizer.set_update_order(["fresh", "hidden"], regrouped)
    case.step()
    halved = {"hidden": layers["hidden"][:1], "out": layers["out"], "fresh": layers["embed"]}
    halved["fresh"] = [*halved["fresh"], layers["hidden"][1]]
    case.trainer.optimizer.set_update_order(["hidden", "out", "fresh"], halved)
    for _ in range(2):
        case.step()
    case.assert_committed(1, 2, 3, 4, 5)


# --- Changes by other code -----------------------------------------------------------------------


def test_an_in_place_change_fails_that_checkpoint_by_name_and_no_other(
    held: Callable[..., Held],
) -> None:
    case = held(hold=False)
    case.step()
    case.trainer.wait()
    case.step()
    with torch.no_grad():
        case.model.hidden.bias.mul_(2)
    with pytest.raises(
        CheckpointError, match=r"step-00000002 failed: tensor 'hidden\.bias' was changed in place"
    ):
        case.trainer.wait()
    case.step()
    case.step()
    case.assert_committed(1, 3, 4)


def test_an_in_place_change_is_told_at_a_step_before_that_changes_anything(
    held: Callable[..., Held],
) -> None:
    case = held()
    case.step()
    with torch.no_grad():
        case.model.hidden.weight.add_(1)
    case.release_all()
    with pytest.raises(CheckpointError, match=r"tensor 'hidden\.weight' was changed in place"):
        case.steps(2)  # the next one's gates find it at the latest
    done = case.trainer.training_step
    if done > 1:
        assert_same(case.values(), case.after[done])
    case.steps(1)
    case.assert_committed(*range(2, done + 2))


def test_a_changed_optimizer_state_is_named_too(held: Callable[..., Held]) -> None:
    case = held()
    case.step()
    case.trainer.optimizer.state[case.model.embed.weight]["exp_avg"].zero_()
    case.release_all()
    with pytest.raises(CheckpointError, match=r"tensor 'embed\.weight\.exp_avg' was changed"):
        case.trainer.wait()


def test_loading_other_weights_under_way_fails_the_checkpoint(held: Callable[..., Held]) -> None:
    case = held()
    case.step()
    case.model.load_state_dict(Plain().state_dict())
    case.release_all()
    with pytest.raises(CheckpointError, match="was changed in place"):
        case.trainer.wait()


def test_training_goes_on_after_a_change_where_failures_are_warned_of(
    held: Callable[..., Held],
) -> None:
    case = held(on_error="warn")
    case.step()
    with torch.no_grad():
        case.model.out.bias.mul_(2)
    case.release_all()
    with pytest.warns(RuntimeWarning, match=r"step-00000001 failed: tensor 'out\.bias'") as told:
        case.steps(2)
    assert len(told) == 1
    assert case.trainer.stats()["checkpoints_failed"] == 1
    case.assert_committed(2, 3)


def behind_torch(tensor: Tensor) -> None:
    tensor.data.mul_(2)


def by_numpy(tensor: Tensor) -> None:
    tensor.detach().numpy()[...] += 1


@pytest.mark.parametrize("change", [behind_torch, by_numpy])
def test_a_change_that_no_version_counter_shows_is_found_by_checksums(
    change: Callable[[Tensor], None], held: Callable[..., Held]
) -> None:
    case = held(verify_staged=True)
    case.step()
    version = case.model.hidden.weight._version
    change(case.model.hidden.weight)
    assert case.model.hidden.weight._version == version
    case.release_all()
    with pytest.raises(CheckpointError, match=r"tensor 'hidden\.weight' was changed in place"):
        case.trainer.wait()
    case.step()
    case.assert_committed(2)


def test_checksums_find_nothing_where_nothing_was_changed(held: Callable[..., Held]) -> None:
    case = held(model=Zoo, verify_staged=True, hold=False)
    for _ in range(4):
        case.step()
    case.assert_committed(1, 2, 3, 4)


# --- It is really layer by layer -----------------------------------------------------------------


class Deep(nn.Module):
    """Layers of several blocks each."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(3))

    def forward(self, tokens: Tensor) -> Tensor:
        x = tokens.float().repeat(1, 22)[:, :64] / 11
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


SMALL_BLOCKS = {"block_size_mb": 1 / 256}  # 4 KiB


def test_the_first_layers_blocks_are_in_the_file_before_the_last_layer_is_updated(
    held: Callable[..., Held],
) -> None:
    case = held(model=Deep, hold=False, **SMALL_BLOCKS)
    case.step()
    case.trainer.wait()
    order = case.trainer.update_order
    assert order == ["layers.2", "layers.1", "layers.0"]
    header = (case.directory / "step-00000001" / "model.safetensors").read_bytes()
    first, last = case.model.layers[2].weight, case.model.layers[0].weight
    old = first.detach().numpy().tobytes()
    position = header.index(old)
    before = last.detach().clone()
    partial = case.directory / "step-00000002.partial" / "model.safetensors"
    seen: list[bool] = []
    gate = case.trainer._saver.before_update

    def at_the_gate(layer: str | None) -> None:
        if layer == order[-1]:
            new = first.detach().numpy().tobytes()
            assert new != old
            # All but its last block, which it shares with the layer after it.
            inner = slice(position + 4096, position + len(new) - 4096)
            wanted = new[4096:-4096]
            eventually(
                lambda: partial.exists() and partial.read_bytes()[inner] == wanted,
                "the first layer is written",
            )
            seen.append(torch.equal(last, before))
        gate(layer)

    case.trainer._saver.before_update = at_the_gate  # type: ignore[method-assign]
    case.step()
    assert seen == [True]
    assert not torch.equal(last, before)
    case.assert_committed(1, 2)


def test_the_first_layer_is_being_copied_before_the_last_one_is_updated(
    held: Callable[..., Held],
) -> None:
    case = held(hold=False)
    case.step()
    case.trainer.wait()
    before = case.session.copies_submitted()
    submitted: list[int] = []
    gate = case.trainer._saver.before_update

    def at_the_gate(layer: str | None) -> None:
        if layer == case.trainer.update_order[-1]:
            eventually(lambda: case.session.copies_submitted() > before, "a copy is submitted")
            submitted.append(case.session.copies_submitted() - before)
        gate(layer)

    case.trainer._saver.before_update = at_the_gate  # type: ignore[method-assign]
    case.step()
    assert submitted[0] in (1, 2)
    case.assert_committed(1, 2)


class OnProcessors:
    """A trainer of `Deep` as users have it: what copies spares the update what it can."""

    def __init__(self, directory: Path) -> None:
        torch.manual_seed(0)
        self.model = Deep()
        self.trainer = LayerwiseCheckpointTrainer(
            self.model,
            torch.optim.Adam(self.model.parameters(), lr=0.01),
            checkpoint_dir=directory,
            **{**LITTLE_MEMORY, **SMALL_BLOCKS},
        )
        self.saver = self.trainer._saver

    def step(self) -> None:
        self.trainer.zero_grad()
        self.model(torch.arange(12).reshape(2, 6)).square().sum().backward()
        self.trainer.step()

    def watch_gates(self, monkeypatch: pytest.MonkeyPatch, at_gate: Callable[[], None]) -> None:
        gate = self.saver.before_update

        def watched(layer: str | None) -> None:
            at_gate()
            gate(layer)

        monkeypatch.setattr(self.saver, "before_update", watched)


def test_layers_that_nobody_would_copy_yet_are_handed_over_after_the_update(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = OnProcessors(directory)
    handed_over: list[set[int]] = []

    def at_gate() -> None:
        begun = case.saver._begun
        assert begun is not None
        if handed_over:
            eventually(begun.ticket.leaves_time_to_update, "a block is full")
        handed_over.append(set(begun.handed_over))

    with case.trainer:
        case.step()
        case.trainer.wait()
        case.watch_gates(monkeypatch, at_gate)
        case.step()
        case.trainer.wait()
        assert handed_over == [set(), {0}, {0}]
        stored = load_file(directory / "step-00000002" / "model.safetensors")
        assert_same(stored, dict(case.model.state_dict()))


@pytest.mark.parametrize("wait", [True, False])
def test_once_all_is_staged_no_layer_has_to_pass_a_gate(
    wait: bool, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = OnProcessors(directory)
    gated: list[int] = []

    def at_gate() -> None:
        gated.append(sum(begun is not case.saver._begun for begun in case.saver.flight.gated))

    with case.trainer:
        case.step()
        case.trainer.end_step()
        (begun,) = case.saver.flight.gated
        if wait:
            eventually(begun.ticket.staged, "everything is staged")
        else:
            monkeypatch.setattr(_C.Ticket, "staged", lambda ticket: False)
        case.watch_gates(monkeypatch, at_gate)
        case.step()
        assert gated == [int(not wait)] * 3


def test_a_set_of_tensors_that_changes_late_in_the_update_is_planned_anew(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a layer that is to be handed over with the rest."""
    case = OnProcessors(directory)
    gates: list[None] = []
    last = case.model.layers[0].weight

    def at_gate() -> None:
        begun = case.saver._begun
        assert begun is not None
        if gates:
            eventually(begun.ticket.leaves_time_to_update, "a block is full")
        gates.append(None)
        if len(gates) == 3:
            case.trainer.optimizer.state[last]["more"] = torch.ones(3)

    with case.trainer:
        case.step()
        case.trainer.wait()
        case.watch_gates(monkeypatch, at_gate)
        case.step()
        case.trainer.wait()
        stored = load_file(directory / "step-00000002" / "optimizer.safetensors")
        assert_same(stored["layers.0.weight.more"], torch.ones(3))


def test_a_tensor_under_a_key_that_is_no_name_is_saved_all_the_same(directory: Path) -> None:
    case = OnProcessors(directory)
    with case.trainer:
        case.step()
        parameter = case.model.layers[0].weight
        case.trainer.optimizer.state[parameter][0] = torch.ones(3)
        for _ in range(3):
            case.step()
        case.trainer.wait()
        assert case.trainer.stats()["checkpoints_committed"] == 4
        case.trainer.optimizer.state[parameter][0].zero_()
        case.trainer.load_checkpoint("step-00000004")
        assert_same(case.trainer.optimizer.state[parameter][0], torch.ones(3))


# --- Delay, and nothing but delay ----------------------------------------------------------------


def test_a_pool_far_smaller_than_the_state_only_delays(held: Callable[..., Held]) -> None:
    case = held(
        model=Deep, hold=False, block_size_mb=1 / 256, batch_size_mb=1 / 16, ratio=1.0, max_async=2
    )
    assert case.trainer.stats()["staging_bytes"] < 160 * 1024
    for _ in range(4):
        case.step()
    case.assert_committed(1, 2, 3, 4)


def test_one_checkpoint_more_than_may_be_in_flight_waits(held: Callable[..., Held]) -> None:
    case = held(max_async=1)
    case.step()
    begin = case.trainer._saver._begin
    begun: list[tuple[str, float]] = []

    def watched(name: str, *rest: Any, **more: Any) -> Any:
        begun.append((f"begin {name}", case.released))
        found = begin(name, *rest, **more)
        begun.append((f"begun {name}", case.released))
        return found

    case.trainer._saver._begin = watched  # type: ignore[method-assign]
    running = Running(case.step)
    eventually(lambda: begun, "the second checkpoint is to be begun")
    assert running.is_alive()
    assert_same(case.values(), case.after[1])
    assert case.trainer.stats()["in_flight"] == 1
    case.release_all()
    running.end()
    assert [name for name, _ in begun] == ["begin step-00000002", "begun step-00000002"]
    assert begun[0][1] == 0
    assert begun[1][1] > 0
    case.step()
    assert case.trainer.stats()["checkpoints_committed"] >= 1
    case.assert_committed(1, 2, 3)


def test_waiting_can_be_given_a_limit(held: Callable[..., Held]) -> None:
    case = held()
    case.step()
    with pytest.raises(TimeoutError, match="still in flight"):
        case.trainer.wait(timeout_s=0.01)
    case.release_all()
    case.trainer.wait(timeout_s=DEADLINE_S)
    assert case.trainer.stats()["last_committed_step"] == 1
    case.assert_committed(1)
