"""What a step will keep in the memory of each rank's devices, predicted from shapes alone."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from meshpipe.mesh import DATA, TENSOR
from meshpipe.optimizer import Optimizer, StageParameters
from meshpipe.pipeline.jaxpr import nbytes
from meshpipe.pipeline.plan import Op, Plan
from meshpipe.pipeline.simulate import StageMemory
from meshpipe.pipeline.stage import TracedStage
from meshpipe.staged_model import StagedModel


@dataclass(frozen=True)
class RankMemory:
    """Bytes on each device of a rank at the peak of a step."""

    rank: int
    parameters: int
    """The parameters, and what is computed from them once per step (a copy in bfloat16)."""
    gradients: int
    optimizer: int
    activations: int
    """What forward keeps for backward, for all microbatches that are alive at once."""
    live_activations: int
    """Microbatches, over the stages of the rank, that are alive at once."""

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer + self.activations


def predict_memory(model: StagedModel, transformation: optax.GradientTransformation) -> list[RankMemory]:
    """The memory of every rank, by tracing the model; nothing is allocated. What XLA needs while it runs is not in it.

    Parameters, gradients and optimizer state are exact. Activations follow a rule of thumb: the data axis splits all,
    the tensor axis all but those of the size of a stage's input or output, which each of its devices holds.
    """
    plan, parameters = model.plan, model.parameters
    optimizer = Optimizer(transformation, parameters).state_shapes
    traced = model.trace()
    activations = [_activation_bytes(stage, model.config.remat) for stage in traced]
    ranks = []
    for rank in range(plan.num_ranks):
        stages = plan.stages_of(rank)
        live = _live(plan, rank)
        kept = max(sum(count * activations[s][0] for s, count in moment.items()) for moment in live)
        ranks.append(
            RankMemory(
                rank=rank,
                parameters=sum(
                    _device_bytes(parameters[s].params.values()) + _hoisted_bytes(traced[s]) for s in stages
                ),
                gradients=sum(_gradient_bytes(parameters[s]) for s in stages),
                optimizer=sum(_device_bytes(jax.tree.leaves(optimizer[s])) for s in stages),
                activations=kept + max(activations[s][1] for s in stages),
                live_activations=max(sum(moment.values()) for moment in live),
            )
        )
    return ranks


def stage_memory(model: StagedModel, transformation: optax.GradientTransformation) -> list[StageMemory]:
    """What each stage keeps on each device of its rank, by tracing the model; nothing is allocated."""
    optimizer = Optimizer(transformation, model.parameters).state_shapes
    memory = []
    for stage, owned, state in zip(model.trace(), model.parameters, optimizer, strict=True):
        activation, again = _activation_bytes(stage, model.config.remat)
        always = _device_bytes(owned.params.values()) + _hoisted_bytes(stage) + _gradient_bytes(owned)
        always += _device_bytes(jax.tree.leaves(state)) + again
        memory.append(StageMemory(activation, kept_for_weights=activation, always=always))
    return memory


def _live(plan: Plan, rank: int) -> list[dict[int, int]]:
    """For every moment of a rank's order, the number of live microbatches of each of its stages."""
    live = dict.fromkeys(plan.stages_of(rank), 0)
    moments = [dict(live)]
    for action in plan.orders[rank]:
        live[action.stage] += action.op is Op.FORWARD
        moments.append(dict(live))
        live[action.stage] -= action.op.accumulates
    return moments


def _device_bytes(leaves: Iterable[Any]) -> int:
    """What one device holds of leaves that know their sharding."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def _gradient_bytes(stage: StageParameters) -> int:
    """Accumulators are kept in float32 or better."""
    return sum(
        math.prod(p.sharding.shard_shape(p.shape)) * jnp.promote_types(p.dtype, jnp.float32).itemsize
        for p in stage.params.values()
    )


def _hoisted_bytes(stage: TracedStage) -> int:
    """Taken to be split as the parameters are on the whole."""
    whole = sum(p.size * p.dtype.itemsize for p in stage.params)
    return nbytes(stage.hoisted_vars) * _device_bytes(stage.params) // whole if whole else 0


def _activation_bytes(stage: TracedStage, remat: str) -> tuple[int, int]:
    """Bytes on a device for each live microbatch, and in backward for the one that is computed again."""
    inputs = [stage.x_vars[i] for i in stage.kept_x]
    residuals = _split_bytes(stage, stage.residual_vars)
    if remat == "none":
        return _split_bytes(stage, inputs) + residuals, 0
    return _split_bytes(stage, stage.x_vars), residuals


def _split_bytes(stage: TracedStage, values: Iterable[Any]) -> int:
    mesh = stage.spec.mesh.shape
    ends: list[Any] = [*stage.x_vars, *(stage.output_vars if not stage.spec.is_last else ())]
    whole = {v.aval.shape for v in ends}
    parts = {True: mesh[DATA], False: mesh[DATA] * mesh[TENSOR]}
    return sum(nbytes([v]) // parts[v.aval.shape in whole] for v in values)
