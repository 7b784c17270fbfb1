"""Freed memory is kept for the next step: seen by the pages that the operating system has to find again."""

import os
import platform
import subprocess
import sys

import pytest

PAGES_AGAIN = """
import resource
import meshpipe
from meshpipe.host_memory import keep_freed_memory

def use():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    values = [b"x" * 2**25 for _ in range(3)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

keep_freed_memory(meshpipe.make_mesh(1))
use()
print(use() * resource.getpagesize() / (3 * 2**25))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
@pytest.mark.parametrize("settings", [{}, {"MALLOC_MMAP_MAX_": "65536"}])
def test_memory_that_was_freed_is_used_again_unless_the_environment_says_otherwise(settings):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    run = subprocess.run(
        [sys.executable, "-c", PAGES_AGAIN], env=environment | settings, capture_output=True, text=True, timeout=100
    )
    assert run.returncode == 0, run.stderr
    share = float(run.stdout)
    assert share > 0.9 if settings else share < 0.1, share
