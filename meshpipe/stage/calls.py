"""How the programs of a stage are called: which values each takes, in which order, and where its results go."""

from collections.abc import Callable, Sequence
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

    `microbatch` is the index of the microbatch, a scalar on the submesh. All other arguments are numbers of slots:
    `x` and `outputs` one for each value, in the order of the graph; `x_gradients` one for each value with a gradient;
    `output_gradients` one for each value and reader. A slot of residuals holds `((leaves of x, leaves of state),
    fresh)`: arrays that existed before and are kept alive, and those that forward made. A slot `for_weights` holds
    `(carried, crossing)`: arrays from forward that the weight part reads again, and those that the input part made for
    it.
    """

    def __init__(self, stage: TracedStage, programs: StagePrograms, slots: StageSlots):
        self._stage, self._programs, self.slots = stage, programs, slots

    def hoisted(self, params: Arrays, state: Arrays) -> Arrays:
        """What all microbatches of a step read, and steps with the same parameters."""
        return self._programs.hoisted(params, tuple([state[i] for i in self._stage.fixed]))

    def begin(self, slots: Slots, params: Arrays, state: Arrays, inputs: Arrays, hoisted: Arrays | None = None) -> None:
        """Fills the slots with the values that a step starts from; `hoisted` is computed unless it is given."""
        stage, programs, at = self._stage, self._programs, self.slots
        slots[at.params] = params
        slots[at.hoisted] = self.hoisted(params, state) if hoisted is None else hoisted
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
        self, microbatch: jax.Array, *, x: Sequence[int], x_gradients: Sequence[int], loss: int
    ) -> Call:
        run, at = self._programs.forward_backward, self.slots
        params, hoisted, state, inputs = at.params, at.hoisted, at.state, at.inputs
        accumulators, totals = at.accumulators, at.totals
        read, write = _reading(x), _writing(x_gradients)
        assert run is not None

        # Every call below reads a slot and writes it in one statement: what it read was donated, and is gone.
        def forward_backward(slots: Slots) -> None:
            slots[accumulators], into_x, slots[state], slots[totals], slots[loss] = run(
                slots[accumulators],
                slots[params],
                slots[hoisted],
                slots[state],
                read(slots),
                slots[inputs],
                microbatch,
                slots[totals],
            )
            write(slots, into_x)

        return forward_backward

    def forward(
        self, microbatch: jax.Array, *, x: Sequence[int], outputs: Sequence[int], residuals: int | None
    ) -> Call:
        """`residuals` is None where the program has no backward of this stage."""
        stage, run, at = self._stage, self._programs.forward, self.slots
        params, hoisted, state, inputs, totals = at.params, at.hoisted, at.state, at.inputs, at.totals
        # Where forward returns no residuals, everything that recomputing them reads is kept in their place.
        keeps_all = self._programs.recompute is not None
        kept_x = tuple(range(len(stage.x))) if keeps_all else stage.kept_x
        kept_state = tuple(range(len(stage.state))) if keeps_all else stage.kept_state
        read, write = _reading(x), _writing(outputs)
        assert run is not None

        def forward(slots: Slots) -> None:
            # Backward reads the state that forward began with, so it is taken before the slot gets the new one.
            before, arrays = slots[state], read(slots)
            values, slots[state], fresh, slots[totals] = run(
                slots[params], slots[hoisted], before, arrays, slots[inputs], microbatch, slots[totals]
            )
            write(slots, values)
            if residuals is not None:
                # A list in a tuple takes less time than a generator, and this runs for every microbatch.
                kept = tuple([arrays[i] for i in kept_x]), tuple([before[i] for i in kept_state])
                slots[residuals] = (kept, fresh)

        return forward

    def _residuals(self, microbatch: jax.Array, residuals: int) -> Callable[[Slots], tuple[Any, Arrays]]:
        """A function that returns the residuals: it reads them from their slot, or recomputes them."""
        recompute, at = self._programs.recompute, self.slots
        params, hoisted, inputs = at.params, at.hoisted, at.inputs
        kept_x, kept_state = self._stage.kept_x, self._stage.kept_state

        def handed_over(slots: Slots) -> tuple[Any, Arrays]:
            kept, fresh = slots[residuals]
            return kept, fresh

        def computed_again(slots: Slots) -> tuple[Any, Arrays]:
            # Forward kept all of x and of the state for this; backward itself reads only a part of them.
            x, before = slots[residuals][0]
            fresh = recompute(slots[params], slots[hoisted], before, x, slots[inputs], microbatch)  # type: ignore[misc]
            return (tuple([x[i] for i in kept_x]), tuple([before[i] for i in kept_state])), fresh

        return handed_over if recompute is None else computed_again

    def backward(
        self, microbatch: jax.Array, *, residuals: int, output_gradients: Sequence[int], x_gradients: Sequence[int]
    ) -> Call:
        run, at = self._programs.backward, self.slots
        params, hoisted, inputs, accumulators = at.params, at.hoisted, at.inputs, at.accumulators
        read, gradients, write = (
            self._residuals(microbatch, residuals),
            _reading(output_gradients),
            _writing(x_gradients),
        )
        assert run is not None

        def backward(slots: Slots) -> None:
            kept, fresh = read(slots)
            slots[accumulators], into_x = run(
                slots[accumulators],
                slots[params],
                slots[hoisted],
                slots[inputs],
                microbatch,
                kept,
                fresh,
                gradients(slots),
            )
            write(slots, into_x)

        return backward

    def backward_input(
        self,
        microbatch: jax.Array,
        *,
        residuals: int,
        output_gradients: Sequence[int],
        x_gradients: Sequence[int],
        for_weights: int,
    ) -> Call:
        programs, at = self._programs.split, self.slots
        params, hoisted, inputs, accumulators = at.params, at.hoisted, at.inputs, at.accumulators
        read, read_gradients = self._residuals(microbatch, residuals), _reading(output_gradients)
        write = _writing(x_gradients)
        assert programs is not None
        run, carried = programs.input, programs.carried

        def backward_input(slots: Slots) -> None:
            kept, fresh = read(slots)
            gradients = read_gradients(slots)
            crossing: Arrays = ()
            if run is not None:  # else all is left to the weight part
                given = slots[accumulators], slots[params], slots[hoisted], slots[inputs], microbatch
                slots[accumulators], into_x, crossing = run(*given, kept, fresh, gradients)
                write(slots, into_x)
            # In the order of `SplitPrograms.carried`. The residuals are freed next: what W reads is kept here.
            of_microbatch = (*kept[0], *kept[1], *fresh, *gradients)
            slots[for_weights] = (tuple([of_microbatch[i] for i in carried]), crossing)

        return backward_input

    def backward_weight(self, microbatch: jax.Array, *, for_weights: int) -> Call:
        programs, at = self._programs.split, self.slots
        params, hoisted, inputs, accumulators = at.params, at.hoisted, at.inputs, at.accumulators
        assert programs is not None
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


def _reading(places: Sequence[int]) -> Callable[[Slots], Arrays]:
    """A function that returns the arrays of some slots, one slot after the other."""
    if len(places) == 1:  # as in a chain; a join would take time in every call
        (place,) = places
        return lambda slots: slots[place]
    return lambda slots: tuple([array for place in places for array in slots[place]])


def _writing(places: Sequence[int]) -> Callable[[Slots, Sequence[Arrays]], None]:
    """A function that leaves each of some values in its slot."""

    def write(slots: Slots, values: Sequence[Arrays]) -> None:
        for place, value in zip(places, values, strict=True):
            slots[place] = value

    def write_one(slots: Slots, values: Sequence[Arrays]) -> None:
        (slots[place],) = values

    if len(places) == 1:
        (place,) = places
        return write_one
    return write
