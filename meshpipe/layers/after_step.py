"""State that is updated once per step, after all microbatches: by the method `after_step` of a layer's modules."""

import inspect
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from meshpipe.layers.examine import run_once_per_step
from meshpipe.layers.layer import Layer, Leaves, Randomness
from meshpipe.layers.sown import sowing
from meshpipe.optimizer.parameters import AfterStep
from meshpipe.stage.jaxpr import variables

METHOD = "after_step"


def after_step_of(layers: Sequence[Layer], borrowed: Collection[str]) -> AfterStep | None:
    """What the modules of a stage's layers do once per step; None where they do nothing.

    `borrowed` has the parameters of the stage that another leaf owns. Raises `ValueError` when a method `after_step`
    takes arguments, draws random numbers, reads such a parameter, or changes anything but its layer's own state.
    """
    having = [layer for layer in layers if layer.once]
    if not having:
        return None
    reads: set[str] = set()
    writes: set[str] = set()
    for layer in having:
        read, written = _traced(layer)
        if tied := sorted(read & set(borrowed)):
            raise ValueError(
                f"after_step must not read a parameter that another layer owns. {layer.title} reads {tied[0]}, which "
                "is tied and gets its value later. Move the method to the layer that owns the parameter."
            )
        reads |= read | written
        writes |= written

    def run(params: Mapping[str, jax.Array], state: Mapping[str, jax.Array]) -> Leaves:
        given = {**params, **state}
        after: Leaves = {}
        for layer in having:
            # What is not read is not given.
            values = {path: given.get(path, _zeros(shape)) for path, shape in {**layer.params, **layer.state}.items()}
            after |= run_after_step(layer, values)
        return {path: value for path, value in after.items() if path in writes}

    kind = tuple(layer.kind if layer.once else (len(layer.params), len(layer.state)) for layer in layers)
    return AfterStep(run, frozenset(reads), frozenset(writes), kind)


def run_after_step(layer: Layer, values: Mapping[str, Any]) -> Leaves:
    """The state of a layer after its modules' `after_step`, from values that include all its leaves; to be traced.

    Raises `ValueError` as `after_step_of` does.
    """

    def call(module: nnx.Module) -> None:
        before = _counts(module)
        for _, part in run_once_per_step(module):
            _check_signature(layer, part)
            with sowing():  # refused afterwards, and not by a warning of Flax
                part.after_step()
        if any(old is not new for old, new in zip(before, _counts(module), strict=True)):
            raise ValueError(
                f"after_step must not draw random numbers. {layer.title} does. Draw them in __call__, and keep them "
                "in an nnx.Variable."
            )

    zero = jnp.uint32(0)
    nothing = Randomness(jax.random.key_data(jax.random.key(0)), zero, zero)
    own = {path: values[path] for path in (*layer.params, *layer.state)}
    _, after = layer.run(call, own, nothing, train=True, method=METHOD)
    return {path: v.get_value() if isinstance(v := after[path], nnx.Variable) else v for path in layer.state}


def _counts(module: nnx.Module) -> list[Any]:
    """The counters of a module's random streams, which every draw advances."""
    return [count.get_value() for _, count in nnx.to_flat_state(nnx.state(module, nnx.RngCount, graph=True))]


def _traced(layer: Layer) -> tuple[set[str], set[str]]:
    """The leaves that a layer's `after_step` reads, and those that it writes."""
    shapes = {**layer.params, **layer.state}
    closed = jax.make_jaxpr(lambda values: run_after_step(layer, values))(shapes)
    inputs = dict(zip(sorted(shapes), closed.jaxpr.invars, strict=True))
    outputs = dict(zip(sorted(layer.state), closed.jaxpr.outvars, strict=True))
    written = {path for path, v in outputs.items() if v is not inputs[path]}
    used = {v for e in closed.jaxpr.eqns for v in variables(e.invars)} | {outputs[path] for path in written}
    return {path for path, v in inputs.items() if v in used}, written


def _check_signature(layer: Layer, part: Any) -> None:
    if inspect.signature(part.after_step).parameters:
        raise ValueError(
            "A method after_step runs once per step, and takes no arguments. That of "
            f"{type(part).__name__} in {layer.title} takes {', '.join(inspect.signature(part.after_step).parameters)}. "
            "Keep what it needs in nnx.Variables of the module, or give the method another name."
        )


def _zeros(shape: Any) -> Any:
    return jnp.zeros(shape.shape, shape.dtype)
