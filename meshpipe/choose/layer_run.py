"""The programs of one layer on values of about the size that they have at the start of training."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from meshpipe.pipeline.transfer import transfer_to
from meshpipe.plan.plan import Op
from meshpipe.sharding import Arrays, Shapes
from meshpipe.stage.calls import Call, Slots, StageCalls, StageSlots
from meshpipe.stage.programs import StagePrograms
from meshpipe.stage.spec import on_submesh
from meshpipe.stage.traced import TracedStage

_STEP = StageSlots(params=0, hoisted=1, state=2, inputs=3, accumulators=4, totals=5)
_RESIDUALS, _FOR_WEIGHTS = 6, 7
"""Slots of a microbatch. Those of values and their gradients follow."""


class LayerRun:
    """A layer that is a stage of its own, or several, with arrays of its own. Making it runs its forward once.

    `x` has the values that it is handed, `inputs` what it reads of a batch. Without `x`, values are made up.
    """

    def __init__(self, stage: TracedStage, programs: StagePrograms, inputs: Arrays, x: Sequence[Arrays] | None = None):
        if x is None:
            x = [made_up(value.on(stage.spec.mesh, stage.microbatch_size)) for value in stage.boundaries_in]
        self._stage, self._programs = stage, programs
        self._stage_calls = StageCalls(stage, programs, _STEP)
        self._slots: Slots = [None] * (_FOR_WEIGHTS + 1)
        self._stage_calls.begin(self._slots, made_up(stage.params), made_up(tuple(stage.spec.state.values())), inputs)
        self._microbatch = jax.device_put(np.uint32(0), stage.microbatch.sharding)
        self._outputs = self._new_slots([()] * len(stage.boundaries_out))
        residuals = _RESIDUALS if stage.spec.has_backward else None
        self._forward = self._stage_calls.forward(
            self._microbatch, x=self._new_slots(x), outputs=self._outputs, residuals=residuals
        )
        self._forward(self._slots)
        self.values: tuple[Arrays, ...] = tuple(self._slots[index] for index in self._outputs)
        """What it hands on."""
        self.activation_bytes = _device_bytes(jax.tree.leaves(self._slots[_RESIDUALS]))
        """That one device keeps of a microbatch for backward."""
        self.parameter_bytes = _device_bytes(self._slots[_STEP.params])

    def calls(self) -> Mapping[Op, Callable[[], Any]]:
        """A call of each program that the layer has, which returns what it computes. A backward takes the residuals of
        the last forward, and its weight part what the last input part left.
        """
        forward = self._returning(self._forward, *self._outputs, _STEP.state, _RESIDUALS, _STEP.totals)
        return {Op.FORWARD: forward} | (self._backwards() if self._stage.spec.has_backward else {})

    def transfer_to(self, mesh: Mesh) -> Callable[[], Any] | None:
        """A call that moves what the layer hands on to another rank; None if it hands on nothing."""
        stage = self._stage
        if not stage.boundaries_out:
            return None
        shapes = on_submesh(stage.boundaries_out, mesh, stage.microbatch_size)
        move = transfer_to(tuple(shape.sharding for shape in shapes))
        arrays = tuple(leaf for leaves in self.values for leaf in leaves)
        return lambda: move(arrays)

    def _backwards(self) -> dict[Op, Callable[[], Any]]:
        calls, programs, microbatch = self._stage_calls, self._programs, self._microbatch
        outputs = zip(self._stage.boundaries_out, self._stage.spec.readers, self.values, strict=True)
        # Gradients have the shapes of the values, and the values have numbers of a likely size.
        seeds = [tuple(leaves[i] for i in b.differentiable) for b, readers, leaves in outputs for _ in range(readers)]
        given, found = self._new_slots(seeds), self._new_slots([()] * len(self._stage.x_gradients))
        made: dict[Op, Callable[[], Any]] = {}
        if programs.backward is not None:
            whole = calls.backward(microbatch, residuals=_RESIDUALS, output_gradients=given, x_gradients=found)
            made[Op.BACKWARD] = self._returning(whole, _STEP.accumulators, *found)
        if programs.split is not None:
            of_input = calls.backward_input(
                microbatch, residuals=_RESIDUALS, output_gradients=given, x_gradients=found, for_weights=_FOR_WEIGHTS
            )
            made[Op.BACKWARD_INPUT] = self._returning(of_input, _STEP.accumulators, *found, _FOR_WEIGHTS)
        if calls.weight_gradients_apart:
            of_weights = calls.backward_weight(microbatch, for_weights=_FOR_WEIGHTS)
            made[Op.BACKWARD_WEIGHT] = self._returning(of_weights, _STEP.accumulators)
        return made

    def _new_slots(self, values: Sequence[Arrays]) -> list[int]:
        first = len(self._slots)
        self._slots += values
        return list(range(first, len(self._slots)))

    def _returning(self, call: Call, *results: int) -> Callable[[], Any]:
        """The call, with the values of the slots that it leaves its results in."""

        def run() -> Any:
            call(self._slots)
            return [self._slots[index] for index in results]

        return run


def made_up(shapes: Shapes) -> Arrays:
    """Arrays of these shapes, with numbers of a likely size."""
    return tuple(jax.device_put([filled(shape) for shape in shapes], [shape.sharding for shape in shapes]))


def filled(value: Any) -> Any:
    """Arrays as they are; a shape with numbers that keep sums of products of size 1: programs may be slow on others."""
    if not isinstance(value, jax.ShapeDtypeStruct):
        return value
    if not jax.dtypes.issubdtype(value.dtype, np.inexact):
        return np.zeros(value.shape, value.dtype)
    if len(value.shape) < 2:
        return np.ones(value.shape, value.dtype)
    return np.resize((_normal() / np.sqrt(np.prod(value.shape[:-1]))).astype(value.dtype), value.shape)


@cache
def _normal() -> np.ndarray:
    return np.random.default_rng(0).normal(size=2**16)


def _device_bytes(arrays: Iterable[jax.Array]) -> int:
    """What one device holds of them."""
    return sum(array.addressable_shards[0].data.nbytes for array in arrays)
