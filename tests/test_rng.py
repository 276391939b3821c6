"""Random generators: captured, saved and restored elsewhere, they draw the same numbers."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import timeit
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from pccheck_ext import _codec, _rng


@pytest.fixture(autouse=True)
def _generators_of_other_tests_are_left_as_they_were() -> Iterator[None]:
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    yield
    random.setstate(before[0])
    np.random.set_state(before[1])
    torch.set_rng_state(before[2])


def draw() -> list[Any]:
    """Something from every generator, odd amounts, so that spare values and positions matter."""
    return [
        [random.random() for _ in range(7)],
        random.gauss(0, 1),
        random.getrandbits(77),
        random.sample(range(1000), 5),
        np.random.rand(3).tolist(),
        np.random.randn(3).tolist(),
        np.random.permutation(10).tolist(),
        torch.rand(3).tolist(),
        torch.randn(3).tolist(),
        torch.randperm(10).tolist(),
        torch.bernoulli(torch.full((20,), 0.5)).tolist(),
    ]


def seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def through_codec(state: Any) -> Any:
    tensors: dict[str, torch.Tensor] = {}
    data = _codec.dumps(_codec.encode(state, "rng", tensors))
    stored = {key: tensor.clone() for key, tensor in tensors.items()}
    return _codec.decode(_codec.loads(data), stored)


@pytest.mark.parametrize("drawn", range(6))
def test_restored_generators_go_on_with_the_same_numbers(drawn: int) -> None:
    seed_all(drawn)
    for _ in range(drawn):
        draw()
        random.random()
    state = through_codec(_rng.capture())
    expected = [draw() for _ in range(3)]
    seed_all(99)
    draw()
    _rng.restore(state)
    assert [draw() for _ in range(3)] == expected


def test_a_state_can_be_restored_in_another_process(tmp_path: Path) -> None:
    seed_all(5)
    draw()
    tensors: dict[str, torch.Tensor] = {}
    text = _codec.dumps(_codec.encode(_rng.capture(), "rng", tensors))
    (tmp_path / "state.json").write_bytes(text)
    save_file(tensors, tmp_path / "tensors.safetensors")
    program = """
import json, random, sys, torch
from safetensors.torch import load_file
from pccheck_ext import _codec, _rng
tensors = load_file(sys.argv[2])
_rng.restore(_codec.decode(_codec.loads(open(sys.argv[1], "rb").read()), tensors))
import numpy as np
print(json.dumps([random.gauss(0, 1), random.random(), np.random.randn(), torch.randn(1).item()]))
"""
    expected = [random.gauss(0, 1), random.random(), np.random.randn(), torch.randn(1).item()]
    root = Path(_rng.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "state.json", tmp_path / "tensors.safetensors"],
        env={**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert _codec.loads(done.stdout.encode()) == expected


def test_a_captured_state_is_not_changed_by_what_is_drawn_later() -> None:
    state = _rng.capture()
    tensors: dict[str, torch.Tensor] = {}
    _codec.encode(state, "rng", tensors)
    before = {key: tensor.clone() for key, tensor in tensors.items()}
    for _ in range(500):
        draw()
    assert all(torch.equal(before[key], tensor) for key, tensor in tensors.items())


def test_restoring_leaves_the_state_usable_a_second_time() -> None:
    state = _rng.capture()
    _rng.restore(state)
    first = [draw() for _ in range(200)]
    _rng.restore(state)
    assert [draw() for _ in range(200)] == first


def test_capturing_draws_nothing() -> None:
    seed_all(1)
    expected = draw()
    seed_all(1)
    _rng.capture()
    assert draw() == expected


def test_the_state_is_a_handful_of_small_byte_tensors_and_not_thousands_of_numbers() -> None:
    tensors: dict[str, torch.Tensor] = {}
    text = _codec.dumps(_codec.encode(_rng.capture(), "rng", tensors))
    assert set(tensors) >= {"rng.python.words", "rng.torch.cpu", "rng.numpy.state.key"}
    assert tensors["rng.python.words"].dtype is torch.uint8
    assert len(text) < 1000
    assert sum(tensor.nbytes for tensor in tensors.values()) < 16384


def test_capturing_costs_far_less_than_a_step() -> None:
    # Some tens of microseconds; the bound leaves room for a busy machine but not for the 5 ms that
    # seeding, copying number by number or starting a device would take.
    assert min(timeit.repeat(_rng.capture, number=100, repeat=5)) / 100 < 1e-3


# --- Python and NumPy ---------------------------------------------------------------------------


def test_numpy_is_left_out_where_nobody_imported_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "numpy.random")
    state = _rng.capture()
    assert "numpy" not in state
    _rng.restore(through_codec(state))


def test_numpy_missing_at_the_restore_is_a_warning_and_the_rest_is_restored(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    state = _rng.capture()
    expected = random.random(), torch.rand(1)
    monkeypatch.setitem(sys.modules, "numpy.random", None)
    with pytest.warns(RuntimeWarning, match=r"numpy\.random.*not installed") as caught:
        _rng.restore(state)
    assert caught[0].filename == __file__
    assert (random.random(), torch.rand(1)) == expected


def test_a_warning_made_an_error_stays_that_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    state = _rng.capture()
    monkeypatch.setitem(sys.modules, "numpy.random", None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeWarning, match="not installed"):
            _rng.restore(state)


def test_another_bit_generator_under_numpys_global_one_is_restored() -> None:
    before = np.random.get_bit_generator()
    try:
        np.random.set_bit_generator(np.random.PCG64(7))
        np.random.rand(3)
        state = through_codec(_rng.capture())
        expected = np.random.rand(5).tolist()
        np.random.rand(11)
        _rng.restore(state)
        assert np.random.rand(5).tolist() == expected
    finally:
        np.random.set_bit_generator(before)
    with pytest.raises(ValueError, match=r"^random state of numpy\.random: .*MT19937"):
        _rng.restore(state)


def test_a_python_with_another_generator_state_is_saved_as_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    taken: list[Any] = []
    monkeypatch.setattr(random, "getstate", lambda: (4, (1, 2, 3), None, "new"))
    monkeypatch.setattr(random, "setstate", taken.append)
    with pytest.raises(ValueError, match="too many values"):
        _rng.capture()  # not silently something else
    monkeypatch.setattr(random, "getstate", lambda: (4, (1, 2, 3), None))
    _rng.restore(through_codec(_rng.capture()))
    assert taken == [(4, (1, 2, 3), None)]


# --- devices ------------------------------------------------------------------------------------


class FakeDevices:
    """Stands in for torch.cuda or torch.mps: generators that are one tensor each."""

    def __init__(self, kind: str, count: int, initialised: bool = True) -> None:
        self.kind = kind
        self.states = [torch.full((16,), i, dtype=torch.uint8) for i in range(count)]
        self.initialised = initialised
        self.calls: list[str] = []

    def is_initialized(self) -> bool:
        return self.initialised

    def init(self) -> None:
        self.calls.append("init")
        self.initialised = True

    def device_count(self) -> int:
        return len(self.states)

    def get_rng_state(self, device: torch.device) -> torch.Tensor:
        assert self.initialised
        assert device.type == self.kind
        return self.states[device.index].clone()

    def set_rng_state(self, state: torch.Tensor, device: torch.device) -> None:
        assert self.initialised
        assert device.type == self.kind
        if state.numel() != 16:
            raise RuntimeError("RNG state is wrong size")
        self.calls.append(f"set {device}")
        self.states[device.index] = state.clone()


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Callable[..., FakeDevices]:
    def install(count: int, initialised: bool = True) -> FakeDevices:
        fake = FakeDevices("cuda", count, initialised)
        monkeypatch.setattr(_rng, "_module", lambda kind: fake if kind == "cuda" else torch.mps)
        return fake

    return install


def test_every_device_of_an_initialised_accelerator_is_captured_and_restored(
    cuda: Callable[..., FakeDevices],
) -> None:
    fake = cuda(3)
    state = through_codec(_rng.capture())
    assert set(state["torch"]) >= {"cpu", "cuda:0", "cuda:1", "cuda:2"}
    expected = [s.clone() for s in fake.states]
    for s in fake.states:
        s += 100
    _rng.restore(state)
    assert all(torch.equal(a, b) for a, b in zip(fake.states, expected, strict=True))


def test_capturing_never_starts_a_device(
    cuda: Callable[..., FakeDevices], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = cuda(2, initialised=False)
    for devices in (None, ["cuda"], ["cuda:1"], [torch.device("cuda", 0)], ["cpu"]):
        assert "cuda:0" not in _rng.capture(devices)["torch"]
    assert fake.calls == []
    monkeypatch.undo()

    def refuse() -> None:
        raise AssertionError("CUDA was initialised")

    initialised = torch.cuda.is_initialized()
    if not initialised:
        monkeypatch.setattr(torch.cuda, "_lazy_init", refuse)
    _rng.capture()
    _rng.capture(["cuda"])
    assert torch.cuda.is_initialized() == initialised


def test_a_device_is_started_before_it_is_restored(cuda: Callable[..., FakeDevices]) -> None:
    # Queued instead, the call would run before a torch.manual_seed() that waits for CUDA as well.
    cuda(1)
    state = _rng.capture()
    fake = cuda(1, initialised=False)
    _rng.restore(state)
    assert fake.calls == ["init", "set cuda:0"]


def test_only_the_devices_named_are_captured(cuda: Callable[..., FakeDevices]) -> None:
    cuda(3)

    def captured(devices: Any) -> set[str]:
        return set(_rng.capture(devices)["torch"]) - {"cpu"}

    assert captured([]) == set()
    assert captured(["cpu"]) == set()
    assert captured(["cuda:1", "cpu"]) == {"cuda:1"}
    assert captured([torch.device("cuda", 2), "cuda:2"]) == {"cuda:2"}
    assert captured(["cuda"]) == {"cuda:0", "cuda:1", "cuda:2"}
    assert captured(device for device in ("cuda:0", "cuda:2")) == {"cuda:0", "cuda:2"}


def test_only_the_devices_named_are_restored_or_started(cuda: Callable[..., FakeDevices]) -> None:
    cuda(3)
    state = _rng.capture()
    fake = cuda(3, initialised=False)
    _rng.restore(state, ["cpu"])
    assert fake.calls == []
    _rng.restore(state, ["cuda:1"])
    assert fake.calls == ["init", "set cuda:1"]
    fake.calls.clear()
    _rng.restore(state, ["cuda"])
    assert [call for call in fake.calls if call != "init"] == [f"set cuda:{i}" for i in range(3)]


def test_a_device_of_the_checkpoint_that_is_absent_is_a_warning_that_names_it(
    cuda: Callable[..., FakeDevices],
) -> None:
    cuda(2)
    state = _rng.capture()
    expected = draw()
    fake = cuda(1)
    with pytest.warns(RuntimeWarning, match=r"cuda:1 .*1 cuda devices.*will differ") as caught:
        _rng.restore(state)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert fake.calls == ["init", "set cuda:0"]
    fake = cuda(0)
    with pytest.warns(RuntimeWarning, match="0 cuda devices") as caught:
        _rng.restore(state)
    assert len(caught) == 2
    assert fake.calls == []
    assert draw() == expected


def test_apples_devices_are_captured_and_restored_likewise(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeDevices("mps", 1)
    monkeypatch.setattr(_rng, "_module", lambda kind: fake if kind == "mps" else torch.cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    state = through_codec(_rng.capture(["mps"]))
    assert set(state["torch"]) == {"cpu", "mps:0"}
    fake.states[0] += 5
    _rng.restore(state)
    assert fake.calls == ["set mps:0"]
    assert torch.equal(fake.states[0], torch.zeros(16, dtype=torch.uint8))


def test_a_device_that_is_not_there_or_not_known_is_refused_by_name(
    cuda: Callable[..., FakeDevices],
) -> None:
    cuda(1)
    with pytest.raises(ValueError, match="cuda:1 is not here: this process has 1 of cuda"):
        _rng.capture(["cuda:1"])
    for name in ("nonsense", "xpu", "meta", object()):
        with pytest.raises(ValueError, match=r"nonsense|xpu|meta|object"):
            _rng.capture([name])  # type: ignore[list-item]
        with pytest.raises(ValueError, match=r"nonsense|xpu|meta|object"):
            _rng.restore(_rng.capture([]), [name])  # type: ignore[list-item]


# --- states that do not fit ---------------------------------------------------------------------


def spoil(path: list[Any], value: Any) -> Any:
    state = _rng.capture()
    place: Any = state
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return state


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        (["python"], None, "Python's random"),
        (["python"], {}, "Python's random"),
        (["python"], (3, (1, 2), None), "Python's random"),
        (["python"], (9, (), None), "Python's random"),
        (["python", "words"], torch.zeros(2499, dtype=torch.uint8), "Python's random: has 2499"),
        (["python", "words"], torch.zeros(2500), "Python's random: not a tensor of bytes"),
        (["python", "words"], torch.full((2500,), 255, dtype=torch.uint8), "Python's random"),
        (["python", "spare"], "x", "Python's random: the spare"),
        (["torch", "cpu"], torch.zeros(3, dtype=torch.uint8), "torch on the CPU"),
        (["torch", "cpu"], torch.zeros(5056), "torch on the CPU"),
        (["torch", "cpu"], "x", "torch on the CPU"),
        (["torch", "nonsense"], torch.zeros(16, dtype=torch.uint8), "torch on nonsense"),
        (["torch", "cuda:0"], torch.zeros(3, dtype=torch.uint8), "torch on cuda:0"),
        (["torch", "cuda:0"], b"0123", "torch on cuda:0"),
        (["torch", 7.5], torch.zeros(16, dtype=torch.uint8), "torch on 7.5"),
        (["numpy"], {}, r"numpy\.random"),
        (["numpy"], None, r"numpy\.random"),
        (["numpy", "state"], {"key": np.zeros(3, np.uint32), "pos": 0}, r"numpy\.random"),
    ],
)
def test_a_state_that_does_not_fit_is_an_error_that_names_the_generator(
    path: list[Any], value: Any, named: str, cuda: Callable[..., FakeDevices]
) -> None:
    cuda(1)
    with pytest.raises(ValueError, match=named):
        _rng.restore(spoil(path, value))


@pytest.mark.parametrize("state", [{}, None, [], {"python": 1}, {"python": 1, "torch": {}}])
def test_what_is_no_saved_state_at_all_is_refused_before_anything_is_set(state: Any) -> None:
    seed_all(2)
    expected = draw()
    seed_all(2)
    with pytest.raises(ValueError, match="not a saved state"):
        _rng.restore(state)
    assert draw() == expected
