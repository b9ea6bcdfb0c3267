"""What a process frees is there for its next allocation: the kernel is not asked for it again."""

import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys
import numpy as np
from sslscale.runtime.allocator import keep_freed_memory

if sys.argv[1] == "keep":
    keep_freed_memory()
def fill():
    np.empty(48 * 2**20, np.uint8).fill(1)
fill()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(8):
    fill()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_a_large_block_is_mapped_once() -> None:
    def faults(how: str) -> int:
        return int(subprocess.run([sys.executable, "-c", SCRIPT, how], capture_output=True, text=True).stdout)

    assert faults("keep") * 4 < faults("leave")
