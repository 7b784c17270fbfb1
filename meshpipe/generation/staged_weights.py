"""The values of a model on the submeshes of its stages, for use without training."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from meshpipe.errors import ArgumentError
from meshpipe.generation.decoding_layers import with_constructors
from meshpipe.generation.memory import check_weights
from meshpipe.layers.choice import Choice
from meshpipe.layers.constructors import Make
from meshpipe.layers.examine import abstract_layers
from meshpipe.layers.layer import LayerLike
from meshpipe.layers.staged_model import StagedModel
from meshpipe.layers.task import Task
from meshpipe.pipeline.config import PipelineConfig
from meshpipe.plan.partition import partition_by_cost
from meshpipe.plan.schedules import gpipe
from meshpipe.sharding import Arrays
from meshpipe.training.state import StateTree

ReadWeights = Callable[[StagedModel], Sequence[StateTree]]
"""Returns the leaves of every local stage, `params` and `state` by leaf path, with the shardings of the model."""


@dataclass(frozen=True)
class StagedWeights:
    """What a model has learned, on the submeshes of the stages of this process."""

    model: StagedModel
    """One stage for each rank, cut so that the ranks hold about equally many bytes."""
    layers: Sequence[LayerLike]
    """Those of the model, whose parameters have the dtypes of the values."""
    values: Mapping[int, Mapping[str, jax.Array]]
    """By local stage and leaf path."""

    @property
    def params(self) -> dict[int, Arrays]:
        return {s: tuple(own[path] for path in self.model.parameters[s].params) for s, own in self.values.items()}

    @property
    def state(self) -> dict[int, Arrays]:
        return {s: tuple(own[path] for path in self.model.parameters[s].state) for s, own in self.values.items()}

    @classmethod
    def of(
        cls, task: Task, mesh: Mesh, read: ReadWeights, num_microbatches: int = 1, dtype: str | None = None
    ) -> "StagedWeights":
        """Cuts the layers of a task into stages, and reads their values. With a `dtype`, kernels and embeddings are
        read into it, in place of that of the layers. Raises `ValueError` when they do not fit into memory.
        """
        if dtype is not None:
            keeping = with_constructors(
                task.layers, lambda make: KeepingConstructor(make, dtype), "to change its dtype"
            )
            task = replace(task, layers=keeping)
        model = forward_model(task, mesh, num_microbatches)
        check_weights(model)
        return cls(model, task.layers, _read(model, read))


@dataclass(frozen=True)
class KeepingConstructor:
    """Makes the module of a layer, whose kernels and embeddings are in `dtype`."""

    make: Make
    dtype: str

    def __call__(self, rngs: nnx.Rngs) -> nnx.Module:
        module = self.make(rngs)
        for _, part in nnx.iter_graph(module, graph=True):
            if isinstance(part, nnx.Param) and part.ndim > 1 and part.dtype == jnp.float32:
                part.set_value(part.get_value().astype(self.dtype))
        return module


def _read(model: StagedModel, read: ReadWeights) -> dict[int, dict[str, jax.Array]]:
    trees = read(model)
    values = {s: {**trees[s].get("params", {}), **trees[s].get("state", {})} for s in model.local}
    for s in model.local:
        for path in (*model.parameters[s].params, *model.parameters[s].state):
            if path not in values[s]:
                raise ArgumentError(f"The weights must have every leaf of the model. They lack {path}.")
    return values


def forward_model(task: Task, mesh: Mesh, num_microbatches: int) -> StagedModel:
    """The model with one stage for each rank of the mesh; ranks hold about equally many bytes."""
    ranks = range(mesh.devices.shape[0])
    layers = abstract_layers(task.layers, task.batch)
    sizes = [sum(leaf.size * leaf.dtype.itemsize for leaf in layer.all_params.values()) for layer in layers]
    choice = Choice(gpipe(len(ranks), num_microbatches), partition_by_cost(sizes, list(ranks)), None)
    config = PipelineConfig(schedule="gpipe", num_microbatches=num_microbatches)
    return StagedModel(task, mesh=mesh, config=config, choice=choice)


def given(weights: Mapping[str, Any]) -> ReadWeights:
    """Reads from arrays by leaf path, such as `meshpipe.load` returns and `Trainer.params` is."""

    def read(model: StagedModel) -> list[StateTree]:
        trees: list[StateTree] = []
        for s, stage in enumerate(model.parameters):
            leaves: dict[str, Any] = {}
            for path, shape in {**stage.params, **stage.state}.items() if s in model.local else ():
                if path not in weights or np.shape(weights[path]) != shape.shape:
                    got = f"one of {list(np.shape(weights[path]))}" if path in weights else "none"
                    raise ArgumentError(
                        "The weights must have every leaf of the model, in its shape. "
                        f"Got {got} for {path} {list(shape.shape)}."
                    )
                # A copy, since the caller may go on to train (donating the array) or to overwrite it.
                leaves[path] = jnp.copy(jax.device_put(jnp.asarray(weights[path], shape.dtype), shape.sharding))
            trees.append({"params": leaves})
        return jax.block_until_ready(trees)  # from now on the caller's memory is not read

    return read
