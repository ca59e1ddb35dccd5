"""Freed memory stays with the process."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

SCRIPT = """
import json, resource, sys
from cdm_core.memory import keep_freed_memory

if sys.argv[1] == "keep" and not keep_freed_memory():
    sys.exit("not glibc")
import torch

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def step():
    blocks = [torch.ones(16 << 18) for _ in range(8)]  # of 16 MiB

for _ in range(12):
    step()
before = faults()
for _ in range(10):
    step()
print(json.dumps([faults() - before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10]))
"""


# By itself glibc adapts, and gives back now and then: here it is to give back every block, always.
GIVES_BACK = {"MALLOC_TRIM_THRESHOLD_": "131072", "MALLOC_MMAP_THRESHOLD_": "131072"}


def measured(how: str) -> tuple[int, int]:
    """Page faults of ten steps that ask for 128 MiB each, and the MiB that the process had at most."""
    command = [sys.executable, "-c", SCRIPT, how]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | GIVES_BACK)
    if "not glibc" in done.stderr:
        pytest.skip("malloc is not glibc's")
    faults, most = json.loads(done.stdout)
    return faults, most


def test_a_step_finds_the_memory_of_the_one_before() -> None:
    (kept, most), (plain, least) = measured("keep"), measured("plain")
    assert plain > 10 * 10_000  # 4 KiB at a time, in every step
    assert kept < 1000
    assert most < least + 256  # and no more memory than two steps need
