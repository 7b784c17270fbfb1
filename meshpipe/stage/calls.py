"""How the programs of a stage are called: which values each takes, in which order, and where its results go."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

from meshpipe.sharding import Arrays
from meshpipe.stage.programs import StagePrograms
from meshpipe.stage.traced import TracedStage, replaced

Slots = list[Any]
"""The values of a step: each slot holds a flat tuple of arrays, or nested tuples of them (see `StageCalls`)."""
Call = Callable[[Slots], None]
"""A call of a program, which reads its arguments from slots and leaves its results there."""


@dataclass(frozen=True, kw_only=True)
class StageSlots:
    """The slots of what a stage has for the whole of a step."""

    params: int
    hoisted: int
    """Values that all microbatches read: state that forward does not change, and what is computed once per step."""
    state: int
    """State that forward changes from microbatch to microbatch."""
    inputs: int
    """What it reads of the batch, of all microbatches."""
    accumulators: int
    """Gradient accumulators, which each backward donates and replaces."""
    totals: int
    """The sums so far: in the last stage loss and weight, and in evaluation metrics. Each forward donates and replaces
    them."""


class StageCalls:
    """Builds the calls of one stage that make up a step. Everything that can be looked up is looked up here, once.

    `microbatch` is the index of the microbatch, a scalar on the submesh. All other arguments are numbers of slots, or
    None where there is no such value. A slot of residuals holds `((leaves of x, leaves of state), fresh)`: arrays that
    existed before and are kept alive, and those that forward made. A slot `for_weights` holds `(carried, crossing)`:
    arrays from forward that the weight part reads again, and those that the input part made for it.
    """

    def __init__(self, stage: TracedStage, programs: StagePrograms, slots: StageSlots):
        self._stage, self._programs, self.slots = stage, programs, slots

    def begin(self, slots: Slots, params: Arrays, state: Arrays, inputs: Arrays) -> None:
        """Fills the slots with the values that a step starts from."""
        stage, programs, at = self._stage, self._programs, self.slots
        slots[at.params] = params
        slots[at.hoisted] = programs.hoisted(params, tuple([state[i] for i in stage.fixed]))
        slots[at.state] = tuple([state[i] for i in stage.changing])
        slots[at.inputs] = inputs
        # Made anew for every step: backward donates accumulators, and those of the last step belong to the optimizer.
        slots[at.accumulators], slots[at.totals] = programs.zeros()

    def state_after(self, slots: Slots, before: Arrays) -> Arrays:
        """All state of the stage after a step that began with `before`."""
        return replaced(before, self._stage.changing, slots[self.slots.state])

    def sums(self, slots: Slots) -> dict[str, jax.Array]:
        """By name, the sums over the microbatches that have run."""
        return dict(zip(self._stage.sum_names, slots[self.slots.totals], strict=True))

    @property
    def reduces(self) -> bool:
        """Whether a step ends with a sum over the data axis."""
        return self._programs.reduce is not None

    @property
    def is_fused(self) -> bool:
        """Whether forward and backward are one call."""
        return self._programs.forward_backward is not None

    @property
    def weight_gradients_apart(self) -> bool:
        """Whether a backward in two parts leaves work to its second."""
        return self._programs.split is not None and self._programs.split.weight is not None

    def forward_backward(
        self, microbatch: jax.Array, *, x: int | None, x_gradients: int | None, loss: int | None
    ) -> Call:
        run, at = self._programs.forward_backward, self.slots
        params, hoisted, state, inputs = at.params, at.hoisted, at.state, at.inputs
        accumulators, totals = at.accumulators, at.totals
        assert run is not None
        assert loss is not None

        def forward_backward(slots: Slots) -> None:
            slots[accumulators], into_x, slots[state], slots[totals], slots[loss] = run(
                slots[accumulators],
                slots[params],
                slots[hoisted],
                slots[state],
                () if x is None else slots[x],
                slots[inputs],
                microbatch,
                slots[totals],
            )
            if x_gradients is not None:
                slots[x_gradients] = into_x

        return forward_backward

    def forward(self, microbatch: jax.Array, *, x: int | None, output: int | None, residuals: int | None) -> Call:
        stage, run, at = self._stage, self._programs.forward, self.slots
        params, hoisted, state, inputs, totals = at.params, at.hoisted, at.state, at.inputs, at.totals
        # Where forward returns no residuals, everything that recomputing them reads is kept in their place.
        keeps_all = self._programs.recompute is not None
        kept_x = tuple(range(len(stage.x))) if keeps_all else stage.kept_x
        kept_state = tuple(range(len(stage.state))) if keeps_all else stage.kept_state
        assert run is not None

        def forward(slots: Slots) -> None:
            # Backward reads the state that forward began with, so it is taken before the slot gets the new one.
            before, arrays = slots[state], () if x is None else slots[x]
            y, slots[state], fresh, slots[totals] = run(
                slots[params], slots[hoisted], before, arrays, slots[inputs], microbatch, slots[totals]
            )
            if output is not None:
                slots[output] = y
            if residuals is not None:
                # A list in a tuple takes less time than a generator, and this runs for every microbatch.
                kept = tuple([arrays[i] for i in kept_x]), tuple([before[i] for i in kept_state])
                slots[residuals] = (kept, fresh)

        return forward

    def _residuals(self, microbatch: jax.Array, residuals: int | None) -> Callable[[Slots], tuple[Any, Arrays]]:
        """A function that returns the residuals: it reads them from their slot, or recomputes them."""
        recompute, at = self._programs.recompute, self.slots
        params, hoisted, inputs = at.params, at.hoisted, at.inputs
        kept_x, kept_state = self._stage.kept_x, self._stage.kept_state
        assert residuals is not None

        def handed_over(slots: Slots) -> tuple[Any, Arrays]:
            kept, fresh = slots[residuals]
            return kept, fresh

        def computed_again(slots: Slots) -> tuple[Any, Arrays]:
            x, before = slots[residuals][0]
            fresh = recompute(slots[params], slots[hoisted], before, x, slots[inputs], microbatch)  # type: ignore[misc]
            return (tuple([x[i] for i in kept_x]), tuple([before[i] for i in kept_state])), fresh

        return handed_over if recompute is None else computed_again

    def backward(
        self, microbatch: jax.Array, *, residuals: int | None, output_gradients: int | None, x_gradients: int | None
    ) -> Call:
        run, at = self._programs.backward, self.slots
        params, hoisted, inputs, accumulators = at.params, at.hoisted, at.inputs, at.accumulators
        read = self._residuals(microbatch, residuals)
        assert run is not None

        def backward(slots: Slots) -> None:
            kept, fresh = read(slots)
            gradients = () if output_gradients is None else slots[output_gradients]
            slots[accumulators], into_x = run(
                slots[accumulators], slots[params], slots[hoisted], slots[inputs], microbatch, kept, fresh, gradients
            )
            if x_gradients is not None:
                slots[x_gradients] = into_x

        return backward

    def backward_input(
        self,
        microbatch: jax.Array,
        *,
        residuals: int | None,
        output_gradients: int | None,
        x_gradients: int | None,
        for_weights: int | None,
    ) -> Call:
        programs, at = self._programs.split, self.slots
        params, hoisted, inputs, accumulators = at.params, at.hoisted, at.inputs, at.accumulators
        read = self._residuals(microbatch, residuals)
        assert programs is not None
        assert for_weights is not None
        run, carried = programs.input, programs.carried

        def backward_input(slots: Slots) -> None:
            kept, fresh = read(slots)
            gradients = () if output_gradients is None else slots[output_gradients]
            slots[accumulators], into_x, crossing = run(
                slots[accumulators], slots[params], slots[hoisted], slots[inputs], microbatch, kept, fresh, gradients
            )
            if x_gradients is not None:
                slots[x_gradients] = into_x
            of_microbatch = (*kept[0], *kept[1], *fresh, *gradients)
            slots[for_weights] = (tuple([of_microbatch[i] for i in carried]), crossing)

        return backward_input

    def backward_weight(self, microbatch: jax.Array, *, for_weights: int | None) -> Call:
        programs, at = self._programs.split, self.slots
        params, hoisted, inputs, accumulators = at.params, at.hoisted, at.inputs, at.accumulators
        assert programs is not None
        assert for_weights is not None
        run = programs.weight

        def backward_weight(slots: Slots) -> None:
            if run is not None:  # else the input part has computed every gradient
                slots[accumulators] = run(
                    slots[accumulators], slots[params], slots[hoisted], slots[inputs], microbatch, *slots[for_weights]
                )

        return backward_weight

    def reduce(self) -> Call:
        run, accumulators, totals = self._programs.reduce, self.slots.accumulators, self.slots.totals
        assert run is not None

        def reduce(slots: Slots) -> None:
            # One argument each: buffers are donated one by one, and not all of them can be.
            slots[accumulators], slots[totals] = run(*slots[accumulators], *slots[totals])

        return reduce
