"""Settings of JAX under which training and evaluation work; each is set before JAX starts, in a process of its own."""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

SCRIPT = """
import numpy as np, optax, jax
import meshpipe
from flax import nnx

meshpipe.use_cpu_devices(4)


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.linear, self.norm = nnx.Linear(8, 8, rngs=rngs), nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)

    def __call__(self, x):
        return self.dropout(x + nnx.gelu(self.norm(self.linear(x))))


rng = np.random.default_rng(0)
batches = [{"inputs": rng.normal(size=(16, 8)).astype(np.float32)} for _ in range(2)]
trainer = meshpipe.Trainer(
    [Block] * 4,
    lambda output, batch: ((output**2).sum(), output.size),
    optax.adamw(1e-2),
    batch=batches[0],
    mesh=meshpipe.make_mesh(2, 2),
    pipeline=meshpipe.PipelineConfig(num_microbatches=4),
    clip_norm=1.0,
    metrics=lambda output, batch: {"size": (abs(output).sum(), output.size)},
)
for batch in batches:
    result = trainer.step(batch)
    trainer.check(result)
    print(float(result.loss))
print(*trainer.evaluate(batches).values())
"""
SETTINGS = {
    "JAX_ENABLE_X64": "1",
    "JAX_DEBUG_NANS": "1",
    "JAX_DEBUG_INFS": "1",
    "JAX_ENABLE_CHECKS": "1",
    "JAX_NUMPY_RANK_PROMOTION": "raise",
}


def numbers(**settings: str) -> list[float]:
    kept = {name: value for name, value in os.environ.items() if name not in ("JAX_PLATFORMS", "XLA_FLAGS")}
    ended = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=kept | settings, capture_output=True, text=True, timeout=300
    )
    assert ended.returncode == 0, ended.stderr
    return [float(word) for word in ended.stdout.split()]


@pytest.fixture(scope="module")
def usual() -> list[float]:
    return numbers()


@pytest.mark.parametrize("name", SETTINGS)
def test_training_and_evaluation_work_under_a_setting(name: str, usual: list[float]) -> None:
    assert len(usual) == 4
    found = numbers(**{name: SETTINGS[name]})
    if name != "JAX_ENABLE_X64":  # its random numbers are others
        assert found == pytest.approx(usual, rel=1e-5)
    assert len(found) == len(usual)
