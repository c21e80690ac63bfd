"""Freed memory is kept by training on a CPU, and returned by its data workers."""

import subprocess
import sys

import pytest

from processes import ROOT

PROBE = """
import resource
import torch

def faults(mib=48, times=24):
    '''The fewest page faults of a cycle in which a tensor is allocated, written and freed.'''
    counts = [resource.getrusage(resource.RUSAGE_SELF).ru_minflt]
    for _ in range(times):
        torch.empty(mib << 20, dtype=torch.uint8).fill_(1)
        counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
    return min(b - a for a, b in zip(counts, counts[1:]))
"""


def probe(code: str) -> str:
    """Run `PROBE` and then `code` in a new process; return the last printed line."""
    out = subprocess.run([sys.executable, "-c", PROBE + code], cwd=ROOT, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    return out.stdout.splitlines()[-1]


@pytest.fixture(autouse=True)
def glibc():
    if not hasattr(__import__("ctypes").CDLL(None), "mallopt"):
        pytest.skip("the C library is not glibc")


def test_a_run_on_the_cpu_keeps_freed_memory():
    pages = (48 << 20) // 4096
    plain, kept = map(
        int,
        probe("""
from util import dist
plain = faults()
dist.init("cpu")
print(plain, faults())""").split(),
    )
    # Huge pages are 512 times as large.
    assert plain >= pages // 512
    assert kept <= plain // 10


def test_data_workers_return_freed_memory():
    """A worker inherits the run's setting by fork, but must not keep the memory of one huge image."""
    grown = float(
        probe("""
from util import dist
from util.data.loading.loader import build_loader

def resident():
    return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith("VmRSS"))

class Images(torch.utils.data.Dataset):
    def __len__(self):
        return 2
    def __getitem__(self, i):
        if i == 0:
            self.before = resident()
            torch.empty(256 << 20, dtype=torch.uint8).fill_(1)
        return dict(image=torch.zeros(1), grown=torch.tensor(resident() - self.before), bad=[])

dist.init("cpu")
torch.empty(64 << 20, dtype=torch.uint8).fill_(1)
print(float(list(build_loader(Images(), None, batch_size=2, num_workers=1))[0]["grown"].max()))""")
    )
    assert grown < 64, f"{grown} MiB of a freed tensor of 256 MiB stayed"
