"""Complex parameters: nothing on the way to an update or a report looks at their real parts alone."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from meshpipe import NonFiniteError, PipelineConfig, Trainer, make_mesh
from meshpipe.observe.diagnose import _all_finite
from meshpipe.reference.verify import Comparison, verify

WIDTH = 4
BATCH = {"inputs": np.random.default_rng(0).normal(size=(8, WIDTH)).astype(np.float32)}


class Fourier(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        real, imaginary = 0.5 * jax.random.normal(rngs.params(), (2, WIDTH, WIDTH))
        self.kernel = nnx.Param(jax.lax.complex(real, imaginary))

    def __call__(self, x: jax.Array) -> jax.Array:
        return jnp.fft.ifft(jnp.fft.fft(x) @ self.kernel[...]).real


def loss(output: jax.Array, batch: Any) -> Any:
    return ((output - 1) ** 2).sum(), output.size


ARGUMENTS: dict[str, Any] = {"mesh": make_mesh(2), "pipeline": PipelineConfig(num_microbatches=2)}


def test_the_norm_counts_both_parts() -> None:
    trainer = Trainer([Fourier] * 2, loss, optax.sgd(0.1), batch=BATCH, **ARGUMENTS)
    _, gradients = trainer.loss_and_gradients(BATCH)
    expected = np.sqrt(sum((np.abs(np.asarray(g)) ** 2).sum() for g in gradients.values()))
    np.testing.assert_allclose(trainer.step(BATCH).grad_norm, expected, rtol=1e-5)


def test_an_imaginary_part_that_is_not_finite_is_found() -> None:
    trainer = Trainer([Fourier] * 2, loss, optax.sgd(0.1), batch=BATCH, **ARGUMENTS)
    trees = trainer.state_tree()
    kernel = np.array(trees[1]["params"]["layers/1/kernel"])
    kernel[0, 0] = complex(1, np.nan)
    trees[1]["params"]["layers/1/kernel"] = kernel
    trainer.load_state_tree(trees, 0)
    with pytest.raises(NonFiniteError, match="parameter layers/1/kernel already is not finite"):
        trainer.check(trainer.step(BATCH))
    assert not _all_finite([np.array([1 + 1j, complex(0, np.inf)], np.complex64)])
    assert _all_finite([np.array([1 + 1j], np.complex64), jnp.ones(2, jnp.bfloat16)])


def test_verification_compares_both_parts() -> None:
    report = verify([Fourier] * 2, loss, optax.sgd(0.1), batches=[BATCH], clip_norm=0.01, **ARGUMENTS)
    assert report.ok, report.first
    comparison = Comparison(1e-3)
    comparison.leaves(1, "gradient", {"w": np.array([1 + 1j])}, {"w": np.array([1 + 2j])})
    assert not comparison.differences[0].ok


def test_a_complex_loss_is_refused() -> None:
    def complex_loss(output: jax.Array, batch: Any) -> Any:
        return jnp.fft.fft(output).sum(), output.size

    with pytest.raises(ValueError, match=r"A loss and its weight must be real\. Got"):
        Trainer([Fourier], complex_loss, optax.sgd(0.1), batch=BATCH, mesh=make_mesh(1))
