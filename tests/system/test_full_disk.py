"""A disk that is really full: a small file system, mounted in a namespace of its own. Needs root,
or a system that lets users make such namespaces.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

FULL_DISK = """
import sys, warnings, torch, os
from torch import nn
import pccheck_ext
directory = sys.argv[1]
model = nn.Linear(512, 512)
trainer = pccheck_ext.LayerwiseCheckpointTrainer(
    model, torch.optim.Adam(model.parameters()), checkpoint_dir=directory, keep_last=1,
    on_error=sys.argv[2], batch_size_mb=2, ratio=2, block_size_mb=0.25)
def step():
    trainer.zero_grad(); model(torch.ones(1, 512)).sum().backward(); trainer.step(); trainer.wait()
step()
hog = os.path.join(directory, "hog")
with open(hog, "wb") as file:
    try:
        while True:
            file.write(b"x" * 65536); file.flush()
    except OSError:
        pass
try:
    step()
    print("no error")
except pccheck_ext.CheckpointError as error:
    print("CheckpointError", error)
os.remove(hog)
step()
trainer.shutdown()
print(pccheck_ext.ModelRecovery(directory).get_latest_checkpoint())
"""


def in_mount_namespace(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a Python script with an 8 MiB file system at its first argument, mounted for it alone."""
    shell = 'mount -t tmpfs -o size=8m tmpfs "$1" && exec "$0" -c "$SCRIPT" "$@"'
    unshare = ["unshare", "--user", "--map-root-user", "--mount"]
    return subprocess.run(
        [*unshare, "sh", "-c", shell, sys.executable, *arguments],
        env={**os.environ, "SCRIPT": script},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_full_disk_fails_one_checkpoint_and_the_next_one_after_room_was_made_commits(
    tmp_path: Path,
) -> None:
    run = tmp_path / "full"
    run.mkdir()
    done = in_mount_namespace(FULL_DISK, str(run), "raise")
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.strip().splitlines()
    assert first.startswith("CheckpointError checkpoint step-00000002 failed")
    assert "No space left on device" in first
    assert "step-00000002.partial" in first
    assert second == "step-00000003"


def test_a_full_disk_is_a_warning_where_asked_for(tmp_path: Path) -> None:
    run = tmp_path / "full"
    run.mkdir()
    done = in_mount_namespace(FULL_DISK, str(run), "warn")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["no error", "step-00000003"]
    assert "No space left on device" in done.stderr
