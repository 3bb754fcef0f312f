"""setup.py: freed memory goes back to the system. What else it does is tested by whole runs in test_train.py."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HOLES = """
import torch
from nanomblip.training.setup import return_memory

def resident():  # kB
    return int(open("/proc/self/status").read().split("VmRSS:")[1].split()[0])

return_memory()
tensors = [torch.ones(1 << 18) for _ in range(300)]  # 1 MB each, below the size that is returned at once
tensors = tensors[::30]
held = resident()
return_memory()
print(held, resident())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's heap is what keeps holes")
def test_holes_in_the_heap_are_returned():
    done = subprocess.run([sys.executable, "-c", HOLES], cwd=ROOT, capture_output=True, text=True, check=True)
    held, after = map(int, done.stdout.split())
    assert held - after > 200_000
