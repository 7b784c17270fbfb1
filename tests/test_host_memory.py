"""A trainer has freed memory kept for the next step: seen by the pages that the operating system has to find again."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES_AGAIN = """
import resource
import numpy as np
import optax
from flax import nnx
import meshpipe

class Dense(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(1, 1, rngs=rngs)

    def __call__(self, x):
        return self.linear(x)

def loss(output, batch):
    return (output**2).sum(), output.size

meshpipe.Trainer(
    [Dense],
    loss,
    optax.sgd(0.1),
    batch={"inputs": np.zeros((1, 1), np.float32)},
    mesh=meshpipe.make_mesh(1),
    pipeline=meshpipe.PipelineConfig(num_microbatches=1),
)

def use():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    values = [b"x" * 2**27 for _ in range(3)]  # more than anything else may have left free
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

use()
print(use() * resource.getpagesize() / (3 * 2**27))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
@pytest.mark.parametrize("settings", [{}, {"MALLOC_MMAP_MAX_": "65536"}], ids=["by itself", "environment"])
def test_memory_that_was_freed_is_used_again_unless_the_environment_says_otherwise(settings: dict[str, str]) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    run = subprocess.run(
        [sys.executable, "-c", PAGES_AGAIN],
        env=environment | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"} | settings,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    share = float(run.stdout)
    assert share > 0.9 if settings else share < 0.1, share
