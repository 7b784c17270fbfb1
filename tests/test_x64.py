"""With `jax_enable_x64`, what is computed in float64 stays in float64; it has to be set before JAX starts."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
SCRIPT = """
import numpy as np, optax, jax, jax.numpy as jnp
import meshpipe
from flax import nnx

meshpipe.use_cpu_devices(2)


class Sum(nnx.Module):
    def __init__(self):
        self.scale = nnx.Param(jnp.ones((), jnp.float64))

    def __call__(self, x):
        return self.scale[...] * x


def loss(output, batch):
    return output.sum(), batch["weight"].sum()


# Neither the sum nor the weight, 2^25 + 1, is a float32, and no square of the gradient is finite as one.
batch = {"inputs": np.array([2.0**25, 1.0]), "weight": np.array([2**25, 1])}
arguments = dict(
    batch=batch, mesh=meshpipe.make_mesh(pipeline=2), pipeline=meshpipe.PipelineConfig(num_microbatches=2)
)
trainer = meshpipe.Trainer([Sum, Sum], loss, optax.sgd(0.1), **arguments)
value, gradients = trainer.loss_and_gradients(batch)
assert value.dtype == jnp.float64 and float(value) == 1.0, value
assert {g.dtype.name for g in gradients.values()} == {"float64"}
result = trainer.step({"inputs": np.array([1e30, 2.0]), "weight": np.array([1, 0])})
trainer.check(result)
assert result.loss.dtype == result.grad_norm.dtype == jnp.float64
np.testing.assert_allclose(float(result.grad_norm), 2**0.5 * 1e30, rtol=1e-14)


def mixed(rngs):
    return nnx.Linear(4, 4, rngs=rngs)  # float32


batch = {"inputs": np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)}
report = meshpipe.verify(
    [mixed, mixed],
    lambda output, batch: ((output**2).sum(), output.size),
    optax.adam(0.1),
    clip_norm=0.1,
    batches=[batch] * 2,
    mesh=meshpipe.make_mesh(pipeline=2),
    pipeline=meshpipe.PipelineConfig(num_microbatches=2),
)
assert report.ok, report.first
"""


GENERATE = """
import golden, numpy as np
import meshpipe
from meshpipe.generation.generator import Generator

meshpipe.use_cpu_devices(2)
expected = golden.expected("llama3")
prompts = [row[:n].tolist() for row, n in zip(expected["ids"], expected["prompt_lengths"], strict=True)]
generator = Generator(golden.CONFIGS["llama3"], golden.leaves("llama3"), mesh=meshpipe.make_mesh(2), batch_size=2)
found = generator.tokens(prompts, max_tokens=expected["continuation"].shape[1])
np.testing.assert_array_equal(found, expected["continuation"])
assert len(generator.tokens(prompts * 3, max_tokens=3, temperature=1.0, top_k=5, top_p=0.9)) == 3 * len(prompts)
"""


def test_losses_weights_and_norms_of_64_bits_keep_them() -> None:
    run_with_x64(SCRIPT)


@pytest.mark.slow
def test_generated_tokens_are_the_same() -> None:
    run_with_x64(GENERATE)


def run_with_x64(script: str) -> None:
    run = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "JAX_ENABLE_X64": "1", "PYTHONPATH": os.pathsep.join(map(str, (TESTS.parent, TESTS)))},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
