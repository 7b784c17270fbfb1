"""Finds where a step first stopped being finite, by running it again layer by layer."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from meshpipe.layers.layer import Leaves, Randomness
from meshpipe.layers.staged_model import StagedModel
from meshpipe.layers.wiring import Output, get, outputs_of
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
    state = {**params, **state}  # a frozen parameter is state of its layer
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
    outputs: dict[Output, Any] = {}
    pullbacks: list[tuple[int, str, Any, Any]] = []
    for stage, cut in enumerate(model.cuts):
        place = replicated(model.stages[stage].submesh)
        draws = jax.device_put((randomness.seed, randomness.step, randomness.microbatch), place)
        for index in cut:
            layer = model.layers[index]
            where = f"{layer.path} (stage {stage})"
            reads = [jax.device_put(get(source, batch, outputs), place) for source in model.wiring.reads(index)]
            own = {path: params[path] for path in layer.params}
            kept = {path: state[path] for path in layer.state}

            def forward(
                own: Leaves,
                value: Any,
                *others: Any,
                layer: Any = layer,
                layer_index: int = index,
                kept: Any = kept,
                draws: Any = draws,
            ) -> Any:
                keywords = dict(zip(layer.fields, others, strict=True))
                value, after, sown = layer(own, kept, value, keywords, Randomness(*draws), train=True)
                return (outputs_of(layer_index, layer, value, sown), sown.terms), after

            with jax.set_mesh(model.stages[stage].submesh):
                (made, terms), pullback, after = jax.vjp(forward, own, *reads, has_aux=True)
            outputs |= made
            if not _all_finite(jax.tree.leaves((made, after))):
                return f"the output of {where} is not finite", state
            for name, term in terms.items():
                if not _all_finite([term]):
                    return f"the term {name!r} that {where} adds to the loss is not finite", state
            state = {**state, **after}
            pullbacks.append((index, where, pullback, jax.tree.map(jnp.ones_like, terms)))
    return _replay_backward(model, outputs, pullbacks, batch), state


def _replay_backward(
    model: StagedModel, outputs: Mapping[Output, Any], pullbacks: Sequence[tuple[int, str, Any, Any]], batch: Any
) -> str | None:
    """The first value that is not finite from the loss down."""
    places = {index: replicated(model.stages[s].submesh) for s, cut in enumerate(model.cuts) for index in cut}
    of_loss = [model.wiring.output, *model.wiring.loss.values()]
    with jax.set_mesh(model.stages[-1].submesh):
        total, pullback, weight = _loss(model, [outputs[output] for output in of_loss], batch)
    if not _all_finite([total, weight]):
        return "every layer's output is finite, and the loss is not"
    gradients: dict[Output, Any] = {}
    found = pullback(jnp.ones_like(total))
    if not _all_finite(jax.tree.leaves(found)):
        return "the gradient of the loss with respect to the outputs that it reads is not finite"
    for output, gradient in zip(of_loss, found, strict=True):
        _add(gradients, output, gradient, places)
    for index, where, pull, of_terms in reversed(pullbacks):
        made = [output for output in outputs if output.layer == index]
        if not gradients.keys() & set(made) and not of_terms:  # nothing in the loss depends on it
            continue
        of_outputs = {
            output: gradients.pop(output) if output in gradients else jax.tree.map(_no_gradient, outputs[output])
            for output in made
        }
        own_gradient, *found = pull((of_outputs, of_terms))
        for path, leaf in own_gradient.items():
            if not _all_finite([leaf]):
                return f"outputs and loss are finite; the gradient of {path} in {where} is not"
        if not _all_finite(jax.tree.leaves(found)):
            return f"outputs and loss are finite; the gradient of the input of {where} is not"
        for source, gradient in zip(model.wiring.reads(index), found, strict=True):
            if isinstance(source, Output):
                _add(gradients, source, gradient, places)
    return None


def _add(gradients: dict[Output, Any], output: Output, gradient: Any, places: Mapping[int, Any]) -> None:
    """Adds to the gradient of an output, on the submesh of its layer's stage."""
    gradient = jax.device_put(gradient, places[output.layer])
    before = gradients.get(output, gradient)

    def add(a: Any, b: Any) -> Any:
        return a if a.dtype == jax.dtypes.float0 else a + b

    gradients[output] = gradient if before is gradient else jax.tree.map(add, before, gradient)


def _no_gradient(leaf: Any) -> Any:
    is_inexact = jnp.issubdtype(leaf.dtype, jnp.inexact)
    return jnp.zeros_like(leaf) if is_inexact else np.zeros(leaf.shape, jax.dtypes.float0)


def _loss(model: StagedModel, values: Sequence[Any], batch: Any) -> tuple[jax.Array, Any, jax.Array]:
    place = replicated(model.stages[-1].submesh)
    fields = jax.device_put(dict(batch), place)

    def run(output: Any, *named: Any) -> Any:
        total, weight = model.task.loss(output, fields, **dict(zip(model.wiring.loss, named, strict=True)))
        return jnp.asarray(total, scalar_dtype()), jnp.asarray(weight, scalar_dtype())

    return jax.vjp(run, *jax.device_put(list(values), place), has_aux=True)


def _all_finite(leaves: Iterable[Any]) -> bool:
    return all(bool(np.isfinite(widened(v)).all()) for v in leaves if jnp.issubdtype(v.dtype, jnp.inexact))
