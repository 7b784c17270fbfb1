"""Freed memory is kept where a command asks for it, and by no trainer: seen by pages that are to be found again."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
USE = """
import resource

def use():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    values = [b"x" * 2**27 for _ in range(3)]  # more than anything else may have left free
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

use()
print(use() * resource.getpagesize() / (3 * 2**27))
"""
PAGES_AGAIN = """
import sys
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

if "asks" in sys.argv:
    meshpipe.host.keep_freed_memory()
meshpipe.Trainer(
    [Dense],
    loss,
    optax.sgd(0.1),
    batch={"inputs": np.zeros((1, 1), np.float32)},
    mesh=meshpipe.make_mesh(1),
    pipeline=meshpipe.PipelineConfig(num_microbatches=1),
)
"""


AFTER_A_COMMAND = """
import sys
from meshpipe.cli import main

assert main(sys.argv[1:]) == 0
"""
RECIPE = "tests/tiny_recipes.py:single"
on_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")


def share_found_again(program: str, *arguments: str, **settings: str) -> float:
    """What share of freed memory the operating system has to find again, after a program."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    run = subprocess.run(
        [sys.executable, "-c", program + USE, *arguments],
        env=environment | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"} | settings,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert run.returncode == 0, run.stderr
    return float(run.stdout.splitlines()[-1])


@on_glibc
@pytest.mark.parametrize(
    ("asks", "settings", "is_kept"),
    [(True, {}, True), (True, {"MALLOC_MMAP_MAX_": "65536"}, False), (False, {}, False)],
    ids=["asked for", "environment", "not asked for"],
)
def test_freed_memory_is_used_again_where_that_was_asked_for_and_the_environment_does_not_say_otherwise(
    asks: bool, settings: dict[str, str], is_kept: bool
) -> None:
    share = share_found_again(PAGES_AGAIN, "asks" if asks else "does not", **settings)
    assert share < 0.1 if is_kept else share > 0.9, share


@on_glibc
@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        ("train", RECIPE, "--steps", "1"),
        ("verify", RECIPE, "--updates", "1"),
        ("plan", RECIPE, "--profile"),
    ],
    ids=["train", "verify", "plan"],
)
def test_commands_that_take_or_measure_steps_ask_for_it(command: tuple[str, ...]) -> None:
    assert share_found_again(AFTER_A_COMMAND, *command) < 0.1
