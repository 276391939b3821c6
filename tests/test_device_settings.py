"""What each device changes, and who decided it: pure rules, tested without the devices."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))

import _devices as devices  # noqa: E402
from _settings import CONFIGS, Asked, Config, Setting, Settings, TrainError, table  # noqa: E402

CONFIG = Config(16, 32, 2, 2, batch_size=6, learning_rate=1e-3, warm_up_steps=1, max_steps=9)
NOTHING: Mapping[str, str] = {}


def settings(
    kind: devices.Kind,
    cores: int = 16,
    config: Config = CONFIG,
    environment: Mapping[str, str] = NOTHING,
    **asked: Any,
) -> dict[str, Setting]:
    rows = devices.device_settings(kind, cores, config, environment, Asked(**asked))
    return {row.name: row for row in Settings(rows)}


def values(kind: devices.Kind, **more: Any) -> dict[str, Any]:
    return {name: row.value for name, row in settings(kind, **more).items()}


def sized(batch_size: int) -> Config:
    return Config(16, 32, 2, 2, batch_size, learning_rate=1e-3, warm_up_steps=1, max_steps=9)


# ---- The table of the contract -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "configured", "expected"),
    [
        ("cuda", 6, 12),
        ("cuda", 8, 16),
        ("cuda", 9, 16),
        ("cuda", 64, 16),
        ("mps", 3, 3),
        ("mps", 4, 4),
        ("mps", 5, 4),
        ("cpu", 1, 1),
        ("cpu", 64, 64),
    ],
)
def test_the_batch_size_follows_the_devices_rule(
    kind: devices.Kind, configured: int, expected: int
) -> None:
    assert values(kind, config=sized(configured))["batch size"] == expected
    assert values(kind, config=sized(configured))["micro-batch size"] == expected


@pytest.mark.parametrize(
    ("kind", "cores", "expected"),
    [
        ("cuda", 4, 4),
        ("cuda", 8, 8),
        ("cuda", 64, 8),
        ("mps", 64, 1),
        ("cpu", 1, 2),
        ("cpu", 3, 3),
        ("cpu", 64, 4),
    ],
)
def test_loader_workers_follow_the_devices_rule(
    kind: devices.Kind, cores: int, expected: int
) -> None:
    assert values(kind, cores=cores)["dataloader workers"] == expected


def test_only_cuda_pins_memory() -> None:
    assert values("cuda")["pin memory"] is True
    assert values("mps")["pin memory"] is False
    assert values("cpu")["pin memory"] is False


def test_allocators_are_set_up_as_the_device_wants_it() -> None:
    cuda, mps, cpu = values("cuda"), values("mps"), values("cpu")
    assert cuda["PYTORCH_CUDA_ALLOC_CONF"] == "max_split_size_mb:128"
    assert cuda["empty cache at start"] is True
    assert mps["PYTORCH_MPS_HIGH_WATERMARK_RATIO"] == "0.0"
    assert mps["PYTORCH_ENABLE_MPS_FALLBACK"] == "1"
    assert mps["memory fraction"] == 0.8
    for other in (mps, cpu):
        assert "PYTORCH_CUDA_ALLOC_CONF" not in other
        assert "empty cache at start" not in other
    for other in (cuda, cpu):
        assert not any("MPS" in name or name == "memory fraction" for name in other)


def test_cudnn_looks_for_the_fastest_unless_the_same_bits_are_wanted() -> None:
    names = ("cuDNN enabled", "cuDNN benchmark", "cuDNN deterministic")
    fast, same = values("cuda"), values("cuda", deterministic=True)
    assert [fast[name] for name in names] == [True, True, False]
    assert [same[name] for name in names] == [True, False, True]
    assert fast["deterministic algorithms"] is False
    assert same["deterministic algorithms"] is True
    assert same["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert "CUBLAS_WORKSPACE_CONFIG" not in fast
    assert not any("cuDNN" in name for name in values("cpu", deterministic=True))
    assert values("cpu", deterministic=True)["deterministic algorithms"] is True


def test_compile_modes_end_in_eager_and_begin_only_when_asked_for() -> None:
    def modes(kind: devices.Kind) -> list[tuple[str, bool | None]]:
        return [(m.mode, m.dynamic) for m in values(kind, enable_compile=True)["compile"]]

    assert modes("cuda") == [("max-autotune", True), ("reduce-overhead", None), ("eager", None)]
    assert modes("mps") == [("reduce-overhead", False), ("eager", None)]
    assert modes("cpu") == [("default", None), ("eager", None)]
    for kind in ("cuda", "mps", "cpu"):
        assert [m.mode for m in values(kind)["compile"]] == ["eager"]


# ---- The learning rate ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["cuda", "mps", "cpu"])
def test_no_device_changes_the_learning_rate_unasked(kind: devices.Kind) -> None:
    rows = settings(kind)
    assert rows["learning rate"] == Setting("learning rate", 1e-3, "config", "yes")
    assert rows["learning-rate scaling"].value == "none"
    assert values(kind, learning_rate=1e-9)["learning rate"] == 1e-9


@pytest.mark.parametrize(
    ("kind", "rate", "expected"),
    [
        ("cuda", 3e-5, 1e-4),
        ("cuda", 3e-4, 3e-4),
        ("mps", 3e-4, 5e-5),
        ("mps", 3e-5, 3e-5),
        ("cpu", 3e-5, 3e-5),
        ("cpu", 1.0, 1.0),
    ],
)
def test_the_old_rule_of_the_learning_rate_stands_behind_an_argument(
    kind: devices.Kind, rate: float, expected: float
) -> None:
    row = settings(kind, learning_rate=rate, lr_scaling="device")["learning rate"]
    assert row.value == expected
    assert row.source == ("device rule" if rate != expected else "command line")


def test_the_learning_rate_scales_with_the_global_batch() -> None:
    linear = settings("cuda", lr_scaling="linear")
    assert linear["batch size"].value == 12
    assert linear["learning rate"].value == 2e-3
    assert linear["learning rate"].source == "command line"
    assert "12/6" in linear["learning rate"].note
    assert linear["learning-rate scaling"].effect == "yes"
    root = values("cpu", lr_scaling="sqrt", batch_size=54, learning_rate=0.1)
    assert root["learning rate"] == pytest.approx(0.3)
    assert values("cpu", lr_scaling="linear")["learning rate"] == 1e-3
    # Pieces that fit into memory are no smaller batch.
    pieces = values("cpu", lr_scaling="linear", batch_size=12, micro_batch_size=2)
    assert pieces["learning rate"] == 2e-3


def test_an_unknown_scaling_is_refused() -> None:
    with pytest.raises(ValueError, match="cubic"):
        devices.scaled_learning_rate(1.0, "cubic", "cpu", 1, 1)


# ---- Provenance ----------------------------------------------------------------------------------


def test_the_command_line_wins_over_the_devices_rule() -> None:
    rows = settings("cuda", batch_size=40, dataloader_workers=0, learning_rate=0.5)
    for name, value in (("batch size", 40), ("dataloader workers", 0), ("learning rate", 0.5)):
        assert (rows[name].value, rows[name].source) == (value, "command line")
    assert (
        settings("mps", dataloader_workers=4)["dataloader workers"].note == "rule of mps: at most 1"
    )


def test_every_value_tells_where_it_is_from() -> None:
    cuda, cpu = settings("cuda"), settings("cpu")
    assert cuda["batch size"].source == "device rule"
    assert cpu["batch size"].source == "config"
    assert cpu["dataloader workers"].source == "device rule"
    assert cuda["PYTORCH_CUDA_ALLOC_CONF"].source == "device rule"
    assert cuda["compile"].source == "default"
    assert settings("cuda", deterministic=True)["cuDNN benchmark"].source == "command line"


@pytest.mark.parametrize("kind", ["cuda", "mps", "cpu"])
def test_what_changes_the_mathematics_is_marked(kind: devices.Kind) -> None:
    rows = settings(kind, lr_scaling="linear")
    assert {n for n, row in rows.items() if row.effect == "yes"} == {
        "batch size",
        "learning rate",
        "learning-rate scaling",
    }
    assert rows["micro-batch size"].effect == "only bits"
    assert rows["dataloader workers"].effect == "no"


def test_pieces_larger_than_the_batch_are_refused() -> None:
    with pytest.raises(TrainError, match="--micro-batch-size 7 is more than the batch size, 6"):
        settings("cpu", micro_batch_size=7)


def test_a_users_own_environment_wins_and_is_told() -> None:
    own = {"PYTORCH_CUDA_ALLOC_CONF": "backend:cudaMallocAsync", "HOME": "/root"}
    row = settings("cuda", environment=own)["PYTORCH_CUDA_ALLOC_CONF"]
    assert (row.value, row.source) == ("backend:cudaMallocAsync", "environment")
    newer = settings("cuda", environment={"PYTORCH_ALLOC_CONF": "x:1"})
    assert "PYTORCH_CUDA_ALLOC_CONF" not in newer
    assert newer["PYTORCH_ALLOC_CONF"].source == "environment"
    mps = settings("mps", environment={"PYTORCH_ENABLE_MPS_FALLBACK": "0"})
    assert mps["PYTORCH_ENABLE_MPS_FALLBACK"].value == "0"
    assert mps["PYTORCH_MPS_HIGH_WATERMARK_RATIO"].source == "device rule"


def test_a_cublas_setting_that_is_not_reproducible_is_told() -> None:
    own = {"CUBLAS_WORKSPACE_CONFIG": ":0:0"}
    row = settings("cuda", environment=own, deterministic=True)["CUBLAS_WORKSPACE_CONFIG"]
    assert (row.value, row.source) == (":0:0", "environment")
    assert ":4096:8" in row.note
    assert settings("cuda", environment=own)["CUBLAS_WORKSPACE_CONFIG"].note == ""


def test_variables_are_put_where_the_user_has_none() -> None:
    environment = {"PYTORCH_ENABLE_MPS_FALLBACK": "0"}
    rows = devices.environment_settings("mps", dict(environment), deterministic=False)
    put = devices.apply_environment(rows, environment)
    assert put == {"PYTORCH_MPS_HIGH_WATERMARK_RATIO": "0.0"}
    assert environment == {
        "PYTORCH_ENABLE_MPS_FALLBACK": "0",
        "PYTORCH_MPS_HIGH_WATERMARK_RATIO": "0.0",
    }


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--device", "cuda", "--deterministic"], "max_split_size_mb:128 :4096:8 None"),
        (["--device", "cuda"], "max_split_size_mb:128 None None"),
        (["--device", "mps"], "None None 1"),
        (["--device", "cpu"], "None None None"),
    ],
)
def test_variables_are_there_before_torch_is_imported(
    tmp_path: Path, arguments: list[str], expected: str
) -> None:
    names = ("PYTORCH_CUDA_ALLOC_CONF", "CUBLAS_WORKSPACE_CONFIG", "PYTORCH_ENABLE_MPS_FALLBACK")
    tmp_path.joinpath("torch.py").write_text(
        f"import os\nprint(*map(os.environ.get, {names}))\nraise SystemExit(7)\n"
    )
    clean = {name: value for name, value in os.environ.items() if name not in names}
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / "train_optimized.py", *arguments],
        env={**clean, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout.strip()) == (7, expected), done.stderr


# ---- Which device --------------------------------------------------------------------------------


def test_cuda_comes_before_mps_and_mps_before_the_cpu() -> None:
    def chosen(cuda: bool, mps: bool) -> Any:
        return devices.choose_device(None, {"cuda": cuda, "mps": mps, "cpu": True}).value

    assert [chosen(True, True), chosen(False, True), chosen(False, False)] == ["cuda", "mps", "cpu"]


def test_a_device_that_is_asked_for_is_there_or_an_error() -> None:
    there: dict[devices.Kind, bool] = {"cuda": True, "mps": False, "cpu": True}
    row = devices.choose_device("cuda:1", there)
    assert (row.value, row.source) == ("cuda:1", "command line")
    with pytest.raises(TrainError, match="no such device here, only cuda, cpu"):
        devices.choose_device("mps", there)
    for wrong in ("tpu", "cuda:", "cuda:x", "cpu:0", "mps:1", ""):
        with pytest.raises(TrainError, match="use cuda"):
            devices.choose_device(wrong, there)


def test_the_device_is_guessed_where_torch_is_not_there_to_tell() -> None:
    assert devices.likely_kind(None, "linux") == "cuda"
    assert devices.likely_kind(None, "darwin") == "mps"
    assert devices.likely_kind("cuda:3", "darwin") == "cuda"
    assert devices.likely_kind("cpu", "linux") == "cpu"


class Recorder:
    """Stands for torch: records in `log` what is called and set on it."""

    def __init__(self, log: list[str], path: str = "torch") -> None:
        self.__dict__.update(_log=log, _path=path)

    def __getattr__(self, name: str) -> Recorder:
        return Recorder(vars(self)["_log"], f"{vars(self)['_path']}.{name}")

    def __setattr__(self, name: str, value: object) -> None:
        vars(self)["_log"].append(f"{vars(self)['_path']}.{name} = {value}")

    def __call__(self, *arguments: object) -> None:
        vars(self)["_log"].append(f"{vars(self)['_path']}{arguments}")


def applied(device: str, **asked: Any) -> list[str]:
    log: list[str] = []
    kind = devices.kind_of(device)
    rows = devices.device_settings(kind, 4, CONFIG, {}, Asked(**asked))
    devices.apply(Recorder(log), device, Settings(rows), print)
    return log


def test_what_the_settings_say_is_set_in_torch() -> None:
    assert applied("cuda:1") == [
        "torch.use_deterministic_algorithms(False,)",
        "torch.cuda.set_device('cuda:1',)",
        "torch.backends.cudnn.enabled = True",
        "torch.backends.cudnn.benchmark = True",
        "torch.backends.cudnn.deterministic = False",
        "torch.cuda.empty_cache()",
    ]
    assert not any("set_device" in line for line in applied("cuda"))  # which wants a number
    assert applied("cuda", deterministic=True)[0] == "torch.use_deterministic_algorithms(True,)"
    assert "torch.backends.cudnn.benchmark = False" in applied("cuda", deterministic=True)
    assert applied("mps")[1:] == ["torch.mps.set_per_process_memory_fraction(0.8,)"]
    assert applied("cpu")[1:] == []


def test_a_memory_fraction_that_mps_refuses_stops_nothing() -> None:
    def refuse(fraction: float) -> None:
        raise RuntimeError("invalid low watermark ratio")

    torch = SimpleNamespace(
        use_deterministic_algorithms=lambda on: None,
        mps=SimpleNamespace(set_per_process_memory_fraction=refuse),
    )
    said: list[str] = []
    rows = devices.device_settings("mps", 4, CONFIG, {}, Asked())
    devices.apply(torch, "mps", Settings(rows), said.append)
    [line] = said
    assert line.startswith("fallback: ")
    assert "invalid low watermark ratio" in line


# ---- The table -----------------------------------------------------------------------------------


def test_the_table_tells_name_value_provenance_and_effect() -> None:
    rows = [
        Setting("learning rate", 1e-3, "config", "yes", "as it was"),
        Setting("pin memory", False, "device rule", "no"),
        Setting("compile", ("a", "b"), "default", "only bits"),
    ]
    lines = table(rows, {"learning rate": 0.1})
    assert [line.split() for line in (lines[0], *lines[2:5])] == [
        ["setting", "value", "from", "changes", "the", "mathematics"],
        ["learning", "rate", "0.001", "(was", "0.1);", "as", "it", "was", "config", "yes"],
        ["pin", "memory", "off", "device", "rule", "no"],
        ["compile", "a,", "then", "b", "default", "only", "bits"],
    ]
    assert len({line.index(word) for line, word in ((lines[0], "from"), (lines[2], "config"))}) == 1


def test_settings_know_their_names() -> None:
    one = Setting("a", 1, "default", "no")
    with pytest.raises(ValueError, match="twice"):
        Settings([one, one])
    with pytest.raises(KeyError):
        Settings([one]).replaced(Setting("b", 1, "default", "no"))


def test_settings_that_decide_bits_are_fit_for_json_and_leave_the_rest_out() -> None:
    rows = Settings(devices.device_settings("cuda", 4, CONFIG, {}, Asked(enable_compile=True)))
    deciding = rows.deciding()
    assert deciding["compile"] == "max-autotune (dynamic), then reduce-overhead, then eager"
    assert deciding["batch size"] == 12
    assert not {"micro-batch size", "dataloader workers", "pin memory"} & set(deciding)
    assert all(isinstance(v, (bool, int, float, str)) for v in deciding.values())
    assert not any(isinstance(v, float) and math.isnan(v) for v in deciding.values())


def test_every_config_has_heads_that_divide_its_width() -> None:
    for config in CONFIGS.values():
        assert config.width % config.heads == 0
