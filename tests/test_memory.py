"""What the C library does with freed memory. Each case has a process of its own, since it changes the allocator."""

import subprocess
import sys

import pytest

from loopq_compile import memory

pytestmark = pytest.mark.skipif(memory._mallinfo is None, reason="needs glibc")
HOLES = """
import torch
from loopq_compile import memory
from loopq_compile.memory import Peak

def holes():
    small = []
    for _ in range(40):  # 640 MiB of temporary tensors, a small one after each
        temporary = [torch.ones(1 << 20) for _ in range(4)]
        small.append([torch.ones(64) for _ in range(4)])
        kept.append(temporary)
    kept.clear()
    return small

kept = []
{before}
peak = Peak(torch.device("cpu"))
small = holes()
{after}
print(peak.now() >> 20)
"""


def resident(before: str, after: str) -> int:
    """MiB that stay after many tensors are freed."""
    done = subprocess.run([sys.executable, "-c", HOLES.format(before=before, after=after)], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    return int(done.stdout)


def test_a_bounded_heap_keeps_freed_memory_up_to_its_slack():
    slack = memory.SLACK >> 20
    assert resident("memory.bound_heap()", "") > 2 * slack, "freed memory is kept for the next tensors"
    assert resident("memory.bound_heap()", "memory.trim_excess()") < slack
    some = "kept += [torch.ones(1 << 20) for _ in range(40)]; kept.clear(); memory.trim_excess()"
    assert 100 < resident("memory.bound_heap()", f"memory.trim(); {some}") <= slack, "less than the slack stays"


def test_without_a_bound_all_of_it_goes_back():
    assert resident("", "memory.trim_excess()") < 32


def test_a_library_without_these_functions_is_left_alone(monkeypatch):
    for name in ("_malloc_trim", "_mallinfo", "_mallopt", "_outside"):
        monkeypatch.setattr(memory, name, None)
    memory.bound_heap()
    memory.trim()
    memory.trim_excess()
    assert memory._find("no_such_function", None) is None
