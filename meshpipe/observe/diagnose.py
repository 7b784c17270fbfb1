"""Finds where a step first stopped being finite, by running it again layer by layer."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from meshpipe.layers.layer import Leaves, Randomness
from meshpipe.layers.staged_model import StagedModel
from meshpipe.sharding import replicated, scalar_dtype, widened


def first_non_finite(
    model: StagedModel, params: Leaves, state: Leaves, seed: int, step: int, batch: Mapping[str, Any]
) -> str:
    """The first value that was not finite, in words, with stage, microbatch and layer.

    Runs forward again on the submeshes, microbatch by microbatch and layer by layer, then backward from the loss down.
    It is slow, and meant for a step that has failed. `params` and `state` are those before that step.
    """
    for path, leaf in params.items():
        if not _all_finite([leaf]):
            return f"parameter {path} already is not finite before the step."
    seed_data = jax.random.key_data(jax.random.key(seed))
    for microbatch in range(model.config.num_microbatches):
        fields = {
            name: np.split(np.asarray(value), model.config.num_microbatches)[microbatch]
            for name, value in batch.items()
        }
        for name, value in fields.items():
            if not _all_finite([value]):
                return f"batch field {name!r} is not finite in microbatch {microbatch}."
        randomness = Randomness(seed_data, jnp.uint32(step), jnp.uint32(microbatch))
        found, state = _replay(model, params, state, fields, randomness)
        if found:
            return f"{found} in microbatch {microbatch}."
    return "every layer's forward and gradient is finite by itself; the sum over the microbatches overflows."


def _replay(
    model: StagedModel, params: Leaves, state: Leaves, batch: Mapping[str, Any], randomness: Randomness
) -> tuple[str | None, Leaves]:
    """One microbatch: the first value that is not finite, and the state afterwards."""
    value: Any = jnp.asarray(batch[model.task.input])
    pullbacks = []
    for stage, cut in enumerate(model.cuts):
        place = replicated(model.stages[stage].submesh)
        value = jax.device_put(value, place)
        fields = jax.device_put(dict(batch), place)
        draws = jax.device_put((randomness.seed, randomness.step, randomness.microbatch), place)
        for index in cut:
            layer = model.layers[index]
            where = f"{layer.path} (stage {stage})"
            own = {path: params[path] for path in layer.params}
            kept = {path: state[path] for path in layer.state}

            def forward(
                own: Leaves,
                value: Any,
                layer: Any = layer,
                kept: Leaves = kept,
                fields: Any = fields,
                draws: Any = draws,
            ) -> Any:
                value, after, _ = layer(own, kept, value, fields, Randomness(*draws), train=True)
                return value, after

            with jax.set_mesh(model.stages[stage].submesh):
                value, pullback, after = jax.vjp(forward, own, value, has_aux=True)
            if not _all_finite(jax.tree.leaves((value, after))):
                return f"the output of {where} is not finite", state
            state = {**state, **after}
            pullbacks.append((where, place, pullback))
    (total, weight), pullback = _loss(model, value, fields)
    if not _all_finite([total, weight]):
        return "every layer's output is finite, and the loss is not", state
    (gradient,) = pullback(jnp.ones_like(total))
    if not _all_finite(jax.tree.leaves(gradient)):
        return "the gradient of the loss with respect to the last layer's output is not finite", state
    for where, place, pull in reversed(pullbacks):
        own_gradient, gradient = pull(jax.device_put(gradient, place))
        for path, leaf in own_gradient.items():
            if not _all_finite([leaf]):
                return f"outputs and loss are finite; the gradient of {path} in {where} is not", state
        if not _all_finite(jax.tree.leaves(gradient)):
            return f"outputs and loss are finite; the gradient of the input of {where} is not", state
    return None, state


def _loss(model: StagedModel, value: Any, fields: Any) -> tuple[tuple[jax.Array, jax.Array], Any]:
    def loss(value: Any) -> tuple[jax.Array, jax.Array]:
        total, weight = model.task.loss(value, fields)
        return jnp.asarray(total, scalar_dtype()), jnp.asarray(weight, scalar_dtype())

    total, pullback, weight = jax.vjp(loss, value, has_aux=True)
    return (total, weight), pullback


def _all_finite(leaves: Iterable[Any]) -> bool:
    return all(bool(np.isfinite(widened(v)).all()) for v in leaves if jnp.issubdtype(v.dtype, jnp.inexact))
