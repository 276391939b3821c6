"""The training script when memory runs out or the compiler gives up: the step is taken again."""

from __future__ import annotations

import importlib
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from _runs import arguments, exhaust_memory, killed_at, log_of, one_thread, result, train
from torch import Tensor, nn

# isort: split
# Found where _runs says they are.
import _attempts
import _losslog
from _devices import CompileMode
from _gpt import GPT


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


# ---- Out of memory -------------------------------------------------------------------------------


def raised_by(action: Callable[[], object]) -> BaseException:
    with pytest.raises(BaseException) as caught:  # noqa: PT011
        action()
    return caught.value


def test_what_counts_as_out_of_memory() -> None:
    assert _attempts.is_out_of_memory(raised_by(exhaust_memory))
    assert _attempts.is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert _attempts.is_out_of_memory(MemoryError())
    for text in (
        "MPS backend out of memory (MPS allocated: 8 GB)",
        "CUDA error: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    ):
        assert _attempts.is_out_of_memory(RuntimeError(text))
    mismatch = raised_by(lambda: torch.zeros(2) @ torch.zeros(3))
    for other in (mismatch, ValueError("CUDA error: out of memory"), KeyboardInterrupt()):
        assert not _attempts.is_out_of_memory(other)


class ShortOfMemory:
    """GPT.loss on a device that, from the n-th optimizer step on, holds only so many samples.

    It fails when everything has been computed: random numbers are drawn by then, and gradients of
    the pieces before are there.
    """

    def __init__(self, patch: pytest.MonkeyPatch, most: int, from_step: int = 3) -> None:
        self.failures = 0
        gradients, loss = _attempts.Attempts.gradients, GPT.loss
        state = {"step": 0, "piece": 0}

        def counting(
            attempts: _attempts.Attempts, inputs: Tensor, targets: Tensor
        ) -> tuple[float, float]:
            state["step"] += 1
            return gradients(attempts, inputs, targets)

        def short(model: GPT, tokens: Tensor, targets: Tensor) -> Tensor:
            value = loss(model, tokens, targets)
            if state["step"] >= from_step and len(tokens) > most:
                state["piece"] += 1
                if len(tokens) == 4 or state["piece"] % 2 == 1:  # the second piece of two
                    self.failures += 1
                    exhaust_memory()
            return value

        patch.setattr(_attempts.Attempts, "gradients", counting)
        patch.setattr(GPT, "loss", short)


def smaller_pieces_from(patch: pytest.MonkeyPatch, step: int, size: int) -> None:
    """Pieces of that size from a step on, without anything having failed."""
    gradients, count = _attempts.Attempts.gradients, iter(range(1, 1000))

    def chosen(
        attempts: _attempts.Attempts, inputs: Tensor, targets: Tensor
    ) -> tuple[float, float]:
        if next(count) >= step:
            attempts.micro_batch = size
        return gradients(attempts, inputs, targets)

    patch.setattr(_attempts.Attempts, "gradients", chosen)


@pytest.mark.parametrize(("most", "failures"), [(2, 1), (1, 2)])
def test_out_of_memory_makes_smaller_pieces_of_the_same_batch(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    most: int,
    failures: int,
) -> None:
    with monkeypatch.context() as patch:
        device = ShortOfMemory(patch, most)
        assert train(tmp_path / "short") == 0
    assert device.failures == failures
    out = capsys.readouterr().out
    assert "micro-batch 4 -> 2, gradients of 1 -> 2 accumulated, batch size 4 as before" in out
    assert ("micro-batch 2 -> 1, gradients of 2 -> 4 accumulated" in out) == (most == 1)
    logged = _losslog.read_log(log_of(tmp_path / "short")).steps
    assert [logged[step].entry.micro_batch for step in (2, 3, 20)] == [4, most, most]

    with monkeypatch.context() as patch:
        smaller_pieces_from(patch, 3, most)
        assert train(tmp_path / "chosen") == 0
    assert result(tmp_path / "short") == result(tmp_path / "chosen")


def test_a_run_that_was_killed_after_it_ran_out_of_memory_resumes_to_the_same_bits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        ShortOfMemory(patch, most=2, from_step=8)
        assert train(tmp_path / "whole") == 0
    with monkeypatch.context() as patch:
        ShortOfMemory(patch, most=2, from_step=8)
        killed_at(8, arguments(tmp_path / "a", "--auto-resume"), tmp_path / "said")
        killed_at(17, arguments(tmp_path / "b", "--auto-resume"), tmp_path / "said")
    capsys.readouterr()
    # This time there is memory. In a the log tells that step 8 was taken in pieces, in b the
    # checkpoint does.
    for name in ("a", "b"):
        assert train(tmp_path / name, "--auto-resume") == 0
        out = capsys.readouterr().out
        assert re.search(r"audit: [2-8] replayed losses equal\n", out)
        row = r"^micro-batch size +2; --micro-batch-size sets it anew +checkpoint +only bits$"
        assert bool(re.search(row, out, re.MULTILINE)) == (name == "b")
        assert result(tmp_path / name) == result(tmp_path / "whole")


def test_one_sample_that_is_too_much_is_a_clear_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(GPT, "loss", lambda model, tokens, targets: exhaust_memory())
    assert train(tmp_path) == 1
    said = capsys.readouterr()
    assert "micro-batch 2 -> 1" in said.out
    assert "out of memory with one sample at a time" in said.err
    assert "DefaultCPUAllocator" in said.err


def test_out_of_memory_within_the_update_ends_the_run_with_what_is_sound(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "run"
    assert train(tmp_path / "unbroken") == 0
    with monkeypatch.context() as patch:
        adam = importlib.import_module("torch.optim.adam")  # which torch.optim hides
        update = adam.adam
        updates = iter(range(1, 100_000))

        def short(*args: Any, **kwargs: Any) -> None:
            update(*args, **kwargs)
            if next(updates) == 100:  # in step 15, of which some layers are updated by then
                exhaust_memory()

        patch.setattr(adam, "adam", short)
        assert train(folder) == 1
    assert "step 15 was updating parameters, which cannot be taken back" in capsys.readouterr().err
    assert train(folder, "--auto-resume") == 0
    assert result(folder) == result(tmp_path / "unbroken")


def small_attempts(
    loss_of: Callable[[Tensor, Tensor], Tensor], model: nn.Module, **more: Any
) -> tuple[_attempts.Attempts, list[str]]:
    said: list[str] = []
    told: dict[str, Any] = {"clip": 1e9, "micro_batch": 6, "modes": [CompileMode("eager")], **more}
    attempts = _attempts.Attempts(
        model, loss_of, torch.device("cpu"), clear=model.zero_grad, announce=said.append, **told
    )
    return attempts, said


def model_with_memory() -> nn.Module:
    """Its forward pass draws random numbers, from both generators, and changes buffers."""
    torch.manual_seed(0)
    random.seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 1))


def test_a_failed_attempt_leaves_nothing_behind() -> None:
    inputs, targets = torch.randn(6, 3), torch.randn(6, 1)

    def outcome(failing: int, micro_batch: int) -> tuple[Any, ...]:
        model = model_with_memory()
        left = [failing]

        def loss_of(x: Tensor, y: Tensor) -> Tensor:
            loss = (model(x) - y * random.random()).square().mean()
            left[0] -= 1
            if left[0] == 0:
                exhaust_memory()
            return loss

        attempts, said = small_attempts(loss_of, model, micro_batch=micro_batch)
        loss = attempts.gradients(inputs, targets)
        assert len(said) == (failing > 0)
        state = [*model.state_dict().values(), *(p.grad for p in model.parameters())]
        drawn = (random.random(), torch.rand(()).item(), attempts.micro_batch)
        return loss, drawn, [t.tolist() for t in state]

    assert outcome(1, micro_batch=6) == outcome(0, micro_batch=3)
    assert outcome(2, micro_batch=3) == outcome(0, micro_batch=2)  # the first piece had passed


def test_pieces_of_a_batch_that_do_not_divide_it_weigh_what_they_hold() -> None:
    torch.manual_seed(1)
    model = nn.Linear(3, 1)
    inputs, targets = torch.randn(5, 3), torch.randn(5, 1)

    def gradient(micro_batch: int) -> tuple[float, Tensor]:
        attempts, _ = small_attempts(
            lambda x, y: (model(x) - y).square().mean(), model, micro_batch=micro_batch
        )
        loss, norm = attempts.gradients(inputs, targets)
        found = torch.cat([p.grad.view(-1) for p in model.parameters() if p.grad is not None])
        assert norm == pytest.approx(found.norm().item())
        return loss, found

    whole = gradient(5)
    for size in (1, 2, 3, 4):
        loss, found = gradient(size)
        assert loss == pytest.approx(whole[0])
        torch.testing.assert_close(found, whole[1])


def test_gradients_are_clipped_as_a_whole() -> None:
    model = nn.Linear(3, 1)
    attempts, _ = small_attempts(lambda x, y: 100 * model(x).mean(), model, clip=2.0)
    _, norm = attempts.gradients(torch.ones(6, 3), torch.ones(6, 1))
    assert norm == pytest.approx(200.0)
    found = torch.cat([p.grad.view(-1) for p in model.parameters() if p.grad is not None])
    assert found.norm().item() == pytest.approx(2.0)


def test_memory_that_runs_out_while_gradients_are_clipped_is_no_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = nn.Linear(3, 1)
    clip, left = nn.utils.clip_grad_norm_, [exhaust_memory]

    def short(*args: Any) -> Tensor:
        for action in [left.pop() for _ in left]:
            action()
        return clip(*args)

    monkeypatch.setattr(nn.utils, "clip_grad_norm_", short)
    attempts, said = small_attempts(lambda x, y: model(x).mean(), model)
    attempts.gradients(torch.ones(6, 3), torch.ones(6, 1))
    assert attempts.micro_batch == 3
    assert len(said) == 1


# ---- Compiling -----------------------------------------------------------------------------------


def test_compile_modes_that_fail_are_told_and_the_step_is_taken_all_the_same() -> None:
    asked: list[tuple[str, bool | None]] = []

    def compiler(function: Any, *, mode: str, dynamic: bool | None) -> Any:
        asked.append((mode, dynamic))
        if mode == "max-autotune":
            raise ImportError("no Triton here")

        def compiled(x: Tensor, y: Tensor) -> Tensor:
            function(x, y).backward()
            raise RuntimeError("graph broke\nwith details")

        return compiled

    inputs, targets = torch.randn(6, 3), torch.randn(6, 1)
    outcomes = []
    for modes in (
        [CompileMode("max-autotune", True), CompileMode("reduce-overhead")],
        [],
    ):
        model = model_with_memory()

        def loss_of(x: Tensor, y: Tensor, model: nn.Module = model) -> Tensor:
            return (model(x) - y).square().mean()

        modes = [*modes, CompileMode("eager")]
        attempts, said = small_attempts(loss_of, model, modes=modes, compiler=compiler)
        loss = attempts.gradients(inputs, targets)
        outcomes.append((loss, [p.grad.tolist() for p in model.parameters()], torch.rand(())))  # type: ignore[union-attr]
        assert str(attempts.compiled) == "eager"
        assert len(said) == len(modes) - 1
        for line, failed, why in zip(
            said, modes, ("no Triton here", "graph broke with details"), strict=False
        ):
            assert line.startswith(f"fallback: compile mode {failed} failed")
            assert why in line
    assert asked == [("max-autotune", True), ("reduce-overhead", None)]
    assert outcomes[0] == outcomes[1]


def test_a_mode_that_works_is_used_for_every_piece() -> None:
    calls: list[str] = []

    def compiler(function: Any, **how: Any) -> Any:
        def compiled(x: Tensor, y: Tensor) -> Tensor:
            calls.append(how["mode"])
            return function(x, y)

        return compiled

    model = nn.Linear(3, 1)
    attempts, said = small_attempts(
        lambda x, y: (model(x) - y).square().mean(),
        model,
        micro_batch=2,
        modes=[CompileMode("reduce-overhead", False), CompileMode("eager")],
        compiler=compiler,
    )
    attempts.gradients(torch.randn(6, 3), torch.randn(6, 1))
    assert calls == ["reduce-overhead"] * 3
    assert said == []


def test_an_error_of_the_model_itself_comes_out_as_it_is() -> None:
    def loss_of(x: Tensor, y: Tensor) -> Tensor:
        raise IndexError("the model's own")

    attempts, said = small_attempts(
        loss_of,
        nn.Linear(3, 1),
        modes=[CompileMode("default"), CompileMode("eager")],
        compiler=lambda function, **how: function,
    )
    with pytest.raises(IndexError, match="the model's own"):
        attempts.gradients(torch.randn(2, 3), torch.randn(2, 1))
    assert len(said) == 1
