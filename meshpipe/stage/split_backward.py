"""Cuts a traced backward in two: the gradient of a stage's input, and the gradients of its parameters.

Zero Bubble Pipeline Parallelism, arXiv 2401.10241, section 2: the previous stage waits for the first part, so it runs
first; the second part fills what would be idle time.
"""

from collections.abc import Sequence

from jax.extend.core import ClosedJaxpr, Literal, Var

from meshpipe.stage.jaxpr import LAYOUT_PRIMITIVES, extract, inline, invariant_values, variables
from meshpipe.stage.residuals import ELEMENTWISE_PRIMITIVES, least_to_keep

_SUMMED = ELEMENTWISE_PRIMITIVES | LAYOUT_PRIMITIVES | {"reduce_sum"}


class SplitBackward:
    """The two parts of one backward. Together they run every equation once, apart from rearrangements.

    Two pullbacks, one for the input and one for the parameters, would each walk the chain of gradients through the
    whole stage: 369 MFLOP in place of 269 for an MLP of four layers.

    Arguments:
        closed: Computes the gradients of the parameters, then those of the stage's input.
        num_parameters: How many of its outputs are gradients of parameters.
        num_step_inputs: How many of its inputs, from the first, exist for the whole step. The others belong to one
            microbatch and are freed after the input part, except for those that the weight part reads.
    """

    def __init__(self, closed: ClosedJaxpr, num_parameters: int, num_step_inputs: int):
        # A call is one equation, and would fall into one of the parts as a whole.
        self.closed = closed = inline(closed)
        jaxpr = closed.jaxpr
        self._weight_gradients: list[Var | Literal] = list(jaxpr.outvars[:num_parameters])
        self._input_gradients: list[Var | Literal] = list(jaxpr.outvars[num_parameters:])
        self._step_inputs = list(jaxpr.invars[:num_step_inputs])
        microbatch_inputs = list(jaxpr.invars[num_step_inputs:])

        in_input_part = _defined_on_the_way(closed, self._input_gradients)
        made = {i for i, v in enumerate(self._weight_gradients) if isinstance(v, Var) and v in in_input_part}
        later = [i for i in range(num_parameters) if i not in made]
        summed, kept = self._summed_with_input(in_input_part, later)
        self.early = tuple(sorted(made | summed))
        """Parameters whose gradients the input part computes. Some it computes anyway: a loop computes both kinds of
        gradients at once, and cannot be run for half of its results without doing the work twice. Others are sums of
        what it has, such as the gradient of the scale of a norm, whose terms need more memory than they take time.
        """
        self.late = tuple(i for i in range(num_parameters) if i not in self.early)
        self.crossing = [v for v in kept if v not in microbatch_inputs]
        """Values that the input part computes for the weight part. They live from one to the other."""
        late = [self._weight_gradients[i] for i in self.late]
        # What the weight part does not reach, of the residuals above all, is freed after the input part: that keeps the
        # memory of a split backward close to that of a whole one.
        reached = set(_first_reached(closed, late, {*self.crossing, *jaxpr.invars}))
        self.carried = tuple(i for i, v in enumerate(microbatch_inputs) if v in reached)
        """Which of the microbatch's inputs the weight part reads again, and so keeps alive."""
        self._carried_vars = [microbatch_inputs[i] for i in self.carried]

    def _summed_with_input(self, in_input_part: set[Var], late: Sequence[int]) -> tuple[set[int], list[Var]]:
        """Which of these gradients the input part sums up, because that leaves it less to keep; and what it keeps."""
        kept = self._kept_between(in_input_part, late)
        sums = {i: read for i in late if (read := self._read_by_sum(in_input_part, i))}
        if not sums:
            return set(), kept
        fewest = self._kept_between(in_input_part, [i for i in late if i not in sums])
        saved = set(kept) - set(fewest)
        chosen = {i for i, read in sums.items() if read & saved}
        if len(chosen) == len(late):  # the plan has a place for the weight part, so some work stays there
            return set(), kept
        return chosen, self._kept_between(in_input_part, [i for i in late if i not in chosen])

    def _read_by_sum(self, in_input_part: set[Var], gradient: int) -> set[Var]:
        """The values on the way to a gradient, if it is a sum of cheap terms of what the input part computes; else
        none.
        """
        part = extract(self.closed, self.closed.jaxpr.invars, [self._weight_gradients[gradient]])
        own = [e for e in part.jaxpr.eqns if not in_input_part.intersection(e.outvars)]
        read = {v for e in own for v in (*variables(e.invars), *e.outvars)}
        is_cheap = all(e.primitive.name in _SUMMED for e in own) and any(e.primitive.name == "reduce_sum" for e in own)
        return read if is_cheap and read & in_input_part else set()

    def _kept_between(self, in_input_part: set[Var], gradients: Sequence[int]) -> list[Var]:
        """The values, of few bytes, that let the weight part compute these gradients without repeating work of the
        input part.
        """
        jaxpr = self.closed.jaxpr
        late = [self._weight_gradients[i] for i in gradients]
        part = extract(self.closed, jaxpr.invars, late)
        own = [e for e in part.jaxpr.eqns if not in_input_part.intersection(e.outvars)]
        # An elementwise operation that only the weight part needs may run in either part. It runs where that stores
        # less: a cast to float32 in the weight part, a sum over two gradients in the input part.
        movable = {v for e in own if e.primitive.name in ELEMENTWISE_PRIMITIVES for v in e.outvars}
        wanted = dict.fromkeys(variables(late))
        only_later: set[Var] = set()
        # Expensive operations of the weight part, its matrix products, stay there: moving them forward would let the
        # previous stage wait for them, which is what the split is to avoid. What reads their results stays as well.
        for equation in own:
            operands = variables(equation.invars)
            if not movable.issuperset(equation.outvars):
                only_later.update(equation.outvars)
                wanted.update(dict.fromkeys(operands))
            elif only_later.intersection(operands):
                only_later.update(equation.outvars)
        return least_to_keep(
            jaxpr,
            wanted,
            invariant_values(jaxpr, self._step_inputs),
            lambda e: e.primitive.name in LAYOUT_PRIMITIVES or movable.issuperset(e.outvars),
            only_later=only_later,
        )

    @property
    def has_no_input_part(self) -> bool:
        """Whether the input part computes nothing, as no input has a gradient: the weight part does it all."""
        return not (self._input_gradients or self.crossing or self.early)

    @property
    def is_whole(self) -> bool:
        """Whether the stage cannot be split: the input part computes everything, and no weight part is left."""
        return not self.late

    def input_part(self) -> ClosedJaxpr:
        """All inputs -> input gradients, crossing values, gradients of the `early` parameters."""
        early = [self._weight_gradients[i] for i in self.early]
        return extract(self.closed, self.closed.jaxpr.invars, [*self._input_gradients, *self.crossing, *early])

    def weight_part(self) -> ClosedJaxpr:
        """Step inputs, carried inputs, crossing values -> gradients of the `late` parameters."""
        late = [self._weight_gradients[i] for i in self.late]
        return extract(self.closed, [*self._step_inputs, *self._carried_vars, *self.crossing], late)


def _defined_on_the_way(closed: ClosedJaxpr, outputs: Sequence[Var | Literal]) -> set[Var]:
    """Every value that is computed on the way to the outputs."""
    part = extract(closed, closed.jaxpr.invars, outputs)
    return {v for equation in part.jaxpr.eqns for v in equation.outvars}


def _first_reached(closed: ClosedJaxpr, outputs: Sequence[Var | Literal], stops: set[Var]) -> list[Var]:
    """The values among `stops` at which a walk back from the outputs ends, in program order."""
    needed = set(variables(outputs))
    for equation in reversed(closed.jaxpr.eqns):
        wanted = [v for v in equation.outvars if v in needed and v not in stops]
        # Nothing behind a stored value is needed for it, so the walk does not go on from there.
        if wanted:
            needed.update(variables(equation.invars))
    order = [*closed.jaxpr.invars, *(v for e in closed.jaxpr.eqns for v in e.outvars)]
    return [v for v in order if v in needed and v in stops]
