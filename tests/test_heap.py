"""What stepping layer by layer asks of the memory allocator."""

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, torch
from pccheck_ext import LayerwiseOptimizer

params = [torch.nn.Parameter(torch.ones(6 << 20, dtype=torch.uint8).view(torch.float32))
          for _ in range(8)]
for param in params:
    param.grad = torch.ones_like(param)
base = torch.optim.AdamW(params, foreach=False)
layers = {str(i): [param] for i, param in enumerate(params)}
optimizer = LayerwiseOptimizer(base, list(layers), layers, layerwise=True)

class Observer:
    def before_step(self): return True
    def before_update(self, layer): pass
    def after_layer(self, layer): pass
    def after_step(self, applied): pass
    def abort_step(self, error): pass

optimizer._observer = Observer()
for _ in range(3):
    optimizer.step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    optimizer.step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(optimizer.get_statistics()["layerwise_steps"])
"""


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="the allocator in question is glibc's"
)
def test_temporaries_of_an_update_are_not_faulted_in_again_for_each_layer() -> None:
    answer = subprocess.run(
        [sys.executable, "-c", FAULTS], capture_output=True, text=True, check=False
    )
    assert answer.returncode == 0, answer.stderr
    faults, layerwise = map(int, answer.stdout.split())
    assert layerwise == 7
    pages = 4 * 8 * (6 << 20) // 4096  # one temporary for each layer in each of the four steps
    assert faults < pages / 4
