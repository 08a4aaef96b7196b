"""Memory that tensors have freed serves the next ones without asking the system."""

import subprocess
import sys

import pytest

PROGRAM = """
import resource, torch
from core.allocator import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(2**21)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

plain = faults()
assert keep_freed_memory()
torch.ones(2**21)
print(plain, faults())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_a_tensor_of_a_size_that_was_freed_takes_no_new_pages() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    plain, kept = map(int, done.stdout.split())
    assert plain > 20 * 500, "2,048 pages of 4 KB a tensor, where each is mapped anew"
    assert kept < 100
