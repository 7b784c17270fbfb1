"""A function calls a module in place of its own call, as a class around the module would, with the module's paths."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from meshpipe import PipelineConfig, Trainer, call, make_mesh, with_fields
from meshpipe.layers.examine import abstract_layers

WIDTH = 8
FIELDS = ("inputs", "keep")


def gated(linear: nnx.Linear, x: jax.Array, keep: jax.Array, *, train: bool) -> jax.Array:
    return x + linear(x) * keep[:, None] * (1.0 if train else 2.0)


class Gated(nnx.Module):
    """What `call` does without: a class that has the module as a part."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.linear = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x: jax.Array, keep: jax.Array, *, train: bool) -> jax.Array:
        return gated(self.linear, x, keep, train=train)


def linear(rngs: nnx.Rngs) -> nnx.Linear:
    return nnx.Linear(WIDTH, WIDTH, rngs=rngs)


def squares(output: jax.Array, batch: dict[str, jax.Array]) -> tuple[jax.Array, int]:
    return jnp.square(output - 1).sum(), output.size


def batch() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {"inputs": rng.normal(size=(8, WIDTH)).astype(np.float32), "keep": np.arange(8, dtype=np.float32) % 2}


def trainer_of(layer: Any) -> Trainer:
    pipeline = PipelineConfig(num_microbatches=2)
    return Trainer([layer] * 4, squares, optax.sgd(0.1), batch=batch(), mesh=make_mesh(2), pipeline=pipeline)


def test_it_trains_as_a_class_around_the_module_does_and_evaluates_in_its_mode() -> None:
    layer, inner = call(linear, gated), trainer_of(Gated)
    trainer = trainer_of(layer)
    assert sorted(trainer.params) == [f"layers/{i}/{name}" for i in range(4) for name in ("bias", "kernel")]
    weights = {path.replace("/linear", ""): value for path, value in inner.params.items()}
    trees = [{**tree, "params": {path: weights[path] for path in tree["params"]}} for tree in trainer.state_tree()]
    trainer.load_state_tree(trees, 0)
    for _ in range(2):
        assert float(trainer.step(batch()).loss) == float(inner.step(batch()).loss)
    np.testing.assert_array_equal(trainer.predict(batch()), inner.predict(batch()))
    mine = [call(linear(rngs=nnx.Rngs(i)), gated) for i in range(4)]
    trainer.update(mine)
    np.testing.assert_array_equal(mine[3].layer.kernel[...], trainer.params["layers/3/kernel"])


def test_layers_with_other_functions_are_of_another_kind() -> None:
    plain, same, other, fields = abstract_layers(
        [
            linear,
            call(linear, gated),
            call(linear, lambda module, x: module(x)),
            with_fields(call(linear, lambda module, x, **rest: module(x)), mine="keep"),
        ],
        FIELDS,
    )
    again = abstract_layers([call(linear, gated)], FIELDS)[0]
    assert same.kind == again.kind
    assert len({plain.kind, same.kind, other.kind, fields.kind}) == 4
    assert (dict(same.fields), same.modes) == ({"keep": "keep"}, ("train",))
    assert dict(fields.fields) == {"mine": "keep"}


@pytest.mark.parametrize("function", [lambda module: module, lambda *, module, x: module(x), dict])
def test_a_function_takes_the_module_and_its_input(function: Any) -> None:
    with pytest.raises(ValueError, match="must be a function of the module and its input"):
        call(linear, function)


def test_a_required_parameter_that_is_no_field_is_refused() -> None:
    with pytest.raises(ValueError, match="requires 'scale'; the batch has inputs, keep"):
        abstract_layers([call(linear, lambda module, x, scale: module(x) * scale)], FIELDS)
