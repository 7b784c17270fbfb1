"""What a caller hands over is his own again as soon as the call returns, although the devices are still at work."""

import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from meshpipe import NonFiniteError, PipelineConfig, Trainer, make_mesh
from meshpipe.data.arrays import _aligned
from meshpipe.reference.verify import verify
from meshpipe.training import unchecked

WIDTH, ROWS = 8, 8
SECONDS = 0.1
"""How long the devices take until they read what the loss compares with."""


def _sleep(x: np.ndarray) -> np.ndarray:
    time.sleep(SECONDS)
    return np.asarray(x)


@jax.custom_vjp
def slow(x: jax.Array) -> jax.Array:
    return jax.pure_callback(_sleep, jax.ShapeDtypeStruct(x.shape, x.dtype), x)


slow.defvjp(lambda x: (slow(x), None), lambda _, gradient: (gradient,))


class Slow(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.linear = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return slow(self.linear(x))


def loss(output: jax.Array, batch: Any) -> Any:
    return ((output - batch["y"]) ** 2).sum(), output.size


def fresh(seed: int = 0) -> dict[str, np.ndarray]:
    """A batch in memory that XLA's CPU backend would read in place."""
    rng = np.random.default_rng(seed)
    batch = {name: _aligned((ROWS, WIDTH), np.float32) for name in ("inputs", "y")}
    for field in batch.values():
        field[:] = rng.normal(size=field.shape)
    return batch


def spoil(batch: dict[str, np.ndarray], value: float = 1e3) -> None:
    for field in batch.values():
        field[:] = value


@pytest.fixture(scope="module")
def made() -> Trainer:
    config = PipelineConfig(num_microbatches=2)
    return Trainer([Slow] * 2, loss, optax.sgd(0.0), batch=fresh(), mesh=make_mesh(2), pipeline=config)


def test_a_batch_may_be_written_to_after_step(made: Trainer) -> None:
    right = float(made.step(fresh()).loss)
    batch = fresh()
    result = made.step(batch)
    spoil(batch)
    assert float(result.loss) == right


def test_a_batch_of_jax_arrays_may_be_deleted_and_donated_after_step(made: Trainer) -> None:
    right = float(made.step(fresh()).loss)
    batch = jax.tree.map(jnp.array, fresh())
    result = made.step(batch)
    spoiled = jax.jit(lambda x: x * 0 + 1e3, donate_argnums=0)(batch["inputs"])
    batch["y"].delete()
    assert float(result.loss) == right
    del spoiled


def reused(numbers: int) -> Iterator[dict[str, np.ndarray]]:
    """As loaders do that keep one buffer."""
    batch = fresh()
    for number in range(numbers):
        for name, field in fresh(number).items():
            batch[name][:] = field
        yield batch
        spoil(batch, np.nan)


def test_evaluation_takes_a_loader_that_uses_its_buffer_again(made: Trainer) -> None:
    assert made.evaluate(reused(3)) == made.evaluate([fresh(number) for number in range(3)])


def test_verification_does_too() -> None:
    def linear(rngs: nnx.Rngs) -> nnx.Module:
        return nnx.Linear(WIDTH, WIDTH, rngs=rngs)

    config = PipelineConfig(num_microbatches=2)
    report = verify([linear] * 2, loss, optax.sgd(0.1), batches=reused(2), mesh=make_mesh(2), pipeline=config)
    assert report.ok, report.first


def test_a_step_that_failed_is_run_again_on_the_batch_that_it_had(made: Trainer) -> None:
    batch = fresh()
    batch["y"][-1] = np.nan
    result = made.step(batch)
    spoil(batch, 1.0)
    with pytest.raises(NonFiniteError, match="batch field 'y' is not finite in microbatch 1"):
        made.check(result)


def test_steps_remember_few_batches(made: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unchecked, "STEPS_AHEAD", 2)
    for _ in range(4):
        result = made.step(fresh())
        assert len(made._unchecked) <= 2
    made.check(result)


def test_restored_arrays_stay_the_callers_unless_donated(made: Trainer) -> None:
    def copies() -> list[Any]:
        return jax.tree.map(jnp.copy, made.state_tree())

    trees = copies()
    made.load_state_tree(trees, 0)
    made.step(fresh())
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(trees))
    hosts = jax.tree.map(lambda leaf: np.array(leaf), trees)
    before = jax.tree.map(np.copy, hosts)
    made.load_state_tree(hosts, 0)
    for leaf in jax.tree.leaves(hosts):
        leaf[...] = 0
    made.step(fresh())
    for path, leaf in before[0]["params"].items():
        np.testing.assert_array_equal(made.params[path], leaf)
    given = copies()
    made.load_state_tree(given, 0, donate=True)
    made.step(fresh())
    assert all(leaf.is_deleted() for tree in given for leaf in tree["params"].values())
