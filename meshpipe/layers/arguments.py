"""Checks the types of `Trainer`'s arguments, and says in words what is wrong."""

from collections.abc import Mapping, Sequence
from typing import Any

from flax import nnx
from jax.sharding import Mesh

from meshpipe.errors import ArgumentError, kind_of
from meshpipe.layers.task import Task
from meshpipe.pipeline.config import PipelineConfig
from meshpipe.sharding import ShardingRules


def check_task(task: Task) -> None:
    """Raises `ValueError` for parts of a task that have the wrong type."""
    check_layers(task.layers)
    _check_functions(task.loss, task.metrics)
    _check_batch(task.batch, task.input)
    _check_parameters(task.tied, task.rules)


def check_layers(layers: Any) -> None:
    """Raises `ArgumentError` unless the layers are a list."""
    if isinstance(layers, Sequence | nnx.List) and not isinstance(layers, str):
        if not layers:
            raise ArgumentError("A model needs at least one layer. Got an empty list.")
        return
    parts = "its parts, in the order in which they are called"
    if isinstance(layers, nnx.Sequential):
        parts = "list(model.layers)"
    what = f"one {type(layers).__name__}" if not isinstance(layers, type) else f"the class {layers.__name__}"
    raise ArgumentError(
        "`layers` must be a list: between its entries the model is cut into stages. "
        f"Got {what}. Pass {parts}, each a module, a constructor that takes rngs, or a function, e.g. "
        "[Embedding, Block, Block, Head]."
    )


def _check_functions(loss: Any, metrics: Any) -> None:
    if not callable(loss):
        raise ArgumentError(f"`loss` must be a function of output and microbatch. Got {kind_of(loss)}.")
    if metrics is not None and not callable(metrics):
        raise ArgumentError(f"`metrics` must be a function of output and microbatch. Got {kind_of(metrics)}.")


def _check_batch(batch: Any, input: Any) -> None:
    if not isinstance(batch, Mapping):
        way_out = (
            "Pass one of its batches: next(data)." if hasattr(batch, "__iter__") else "Pass {'inputs': array, ...}."
        )
        raise ArgumentError(
            f"`batch` must be a dict of arrays, an example of what `step` gets. Got {kind_of(batch)}. {way_out}"
        )
    if not isinstance(input, str):
        raise ArgumentError(f"`input` must be the name of a field of the batch. Got {input!r}.")
    for name, value in batch.items():
        if not isinstance(name, str) or not name:
            raise ArgumentError(f"The fields of a batch must have names, as layers ask for them by name. Got {name!r}.")
        if isinstance(value, Mapping):
            raise ArgumentError(
                f"A batch must be a flat dict of arrays. {name!r} is {kind_of(value)}. Give every field of it a name "
                "of its own."
            )


def _check_parameters(tied: Any, rules: Any) -> None:
    if not isinstance(rules, ShardingRules):
        raise ArgumentError(f"`rules` must be meshpipe.ShardingRules. Got {rules!r}. Pass ShardingRules(rules=...).")
    groups = tied if isinstance(tied, Sequence) and not isinstance(tied, str) else [tied]
    for group in groups:
        paths = group if isinstance(group, Sequence) and not isinstance(group, str) else ()
        if len(paths) < 2 or not all(isinstance(path, str) for path in paths):
            raise ArgumentError(
                "`tied` must be a list of groups of leaf paths, each of at least two that are one parameter. "
                f"Got {group!r} in it. Write e.g. tied=[('layers/0/embedding', 'layers/5/kernel')]."
            )


def check_layout(mesh: Any, pipeline: Any, optimizer: Any) -> None:
    """Raises `ValueError` for a mesh, config or optimizer of the wrong type."""
    if not isinstance(mesh, Mesh):
        raise ArgumentError(
            f"`mesh` must be a jax.sharding.Mesh. Got {mesh!r}. Pass meshpipe.make_mesh(pipeline=..., data=...)."
        )
    if not isinstance(pipeline, PipelineConfig):
        raise ArgumentError(
            f"`pipeline` must be a meshpipe.PipelineConfig. Got {pipeline!r}. Pass "
            "meshpipe.PipelineConfig(schedule=..., num_microbatches=...)."
        )
    if isinstance(optimizer, type) or not all(callable(getattr(optimizer, name, None)) for name in ("init", "update")):
        name = getattr(optimizer, "__name__", None)
        got, way_out = (kind_of(optimizer), "Pass e.g. optax.adam(1e-3).")
        if name is not None:
            got, way_out = name, f"Call it: {name}(...)." if not isinstance(optimizer, type) else way_out
        raise ArgumentError(f"`optimizer` must be an Optax transformation, with init and update. Got {got}. {way_out}")
