"""The backward of a stage: traced, rewritten as it is compiled, and cut in two where a plan splits it."""

from collections.abc import Set
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr

from meshpipe.plan.plan import Op
from meshpipe.sharding import Arrays, Shapes, abstract
from meshpipe.stage.accumulate import AccumulatedOutputs, Accumulators, numbered
from meshpipe.stage.jaxpr import extract, inline
from meshpipe.stage.recomputed import has_checkpoint
from meshpipe.stage.reuse import reuse
from meshpipe.stage.split_backward import SplitBackward
from meshpipe.stage.traced import TracedStage


def trace_pullback(stage: TracedStage, hoisted: Shapes, residuals: Shapes) -> ClosedJaxpr:
    """The stage's backward traced as JAX's derivative has it: gradients of its parameters, then of what it is handed.
    What it recomputes stands in checkpoints.
    """
    example = _backward_arguments(stage, hoisted, residuals)
    return jax.make_jaxpr(lambda *arguments: _pull_back(stage, arguments))(*example)


def trace_backward(stage: TracedStage, hoisted: Shapes, residuals: Shapes) -> ClosedJaxpr:
    """The same as it is compiled."""
    return _as_compiled(stage, hoisted, trace_pullback(stage, hoisted, residuals))


def trace_split(stage: TracedStage, hoisted: Shapes, residuals: Shapes) -> SplitBackward:
    """The same cut in two; nothing is compiled."""
    return _cut(stage, hoisted, trace_backward(stage, hoisted, residuals))


class BackwardParts:
    """A stage's traced backward, whole or split or both as the plan requires, and the accumulators of its gradients."""

    def __init__(self, stage: TracedStage, hoisted: Shapes, residuals: Shapes, ops: Set[Op]):
        pullback = trace_pullback(stage, hoisted, residuals)
        self.has_checkpoint = has_checkpoint(pullback)
        """Whether it computes a part of forward again, as `jax.checkpoint` has it."""
        traced = _as_compiled(stage, hoisted, pullback)
        self.arguments = _backward_arguments(stage, hoisted, residuals)
        """Shapes of what follows the accumulators."""
        self.whole = (
            AccumulatedOutputs(stage, traced, numbered(range(len(stage.params)))) if Op.BACKWARD in ops else None
        )
        # Both where one stage of a shared trace has whole backwards and another has split ones.
        self.split = parts = _cut(stage, hoisted, traced) if Op.BACKWARD_INPUT in ops else None
        programs = [self.whole]
        if parts is not None:
            # What the input part returns before its gradients of parameters.
            num_others = sum(map(len, stage.x_gradients)) + len(parts.crossing)
            self.input = AccumulatedOutputs(stage, parts.input_part(), numbered(parts.early, num_others))
            self.weight = AccumulatedOutputs(stage, parts.weight_part(), numbered(parts.late))
            programs += [self.input, self.weight]
        present = [program for program in programs if program is not None]
        # One set of accumulators for all of them: what one program leaves unreduced, the others must leave so too.
        self.gradients = Accumulators.of(_gradients(stage.params), present, _gradients(stage.params_in_step))


def _backward_arguments(stage: TracedStage, hoisted: Shapes, residuals: Shapes) -> tuple[Any, ...]:
    """Shapes of what a backward takes after the accumulators."""
    output_gradients = tuple(shape for shapes in stage.output_gradients for shape in shapes)
    kept = tuple(stage.x[i] for i in stage.kept_x), tuple(stage.state[i] for i in stage.kept_state)
    return stage.params, hoisted, stage.inputs, stage.microbatch, kept, residuals, output_gradients


def _pull_back(stage: TracedStage, arguments: tuple[Any, ...]) -> tuple[Arrays, Arrays]:
    gradients, into_x = stage.pull_back(*arguments)
    return tuple(gradients), tuple(into_x)


def _as_compiled(stage: TracedStage, hoisted: Shapes, pullback: ClosedJaxpr) -> ClosedJaxpr:
    inputs = pullback.jaxpr.invars
    is_again = has_checkpoint(pullback)
    if is_again:
        # What a microbatch has of its own waits at the barriers of checkpoints. Parameters do not, and what depends on
        # them alone can then still be told from the rest.
        pullback = inline(pullback, inputs[_num_step_inputs(stage, hoisted) :])
    if is_again or stage.spec.gathered:
        # Neither the checkpoints of JAX nor derivatives of a user's own know what was computed from parameters before
        # the step.
        known = len(stage.params) + len(stage.fixed_vars)
        pullback = reuse(pullback, stage.prepare(), inputs[:known], inputs[known : len(stage.params) + len(hoisted)])
        pullback = extract(pullback, inputs, pullback.jaxpr.outvars, effects=True)
    rewrite = stage.spec.target.rewrite_products
    return pullback if rewrite is None else rewrite(pullback)


def _num_step_inputs(stage: TracedStage, hoisted: Shapes) -> int:
    """How many arguments of a backward, from the first, are the same for all microbatches, or the number of one."""
    return len(stage.params) + len(hoisted) + len(stage.inputs) + 1


def _cut(stage: TracedStage, hoisted: Shapes, traced: ClosedJaxpr) -> SplitBackward:
    return SplitBackward(traced, len(stage.params), _num_step_inputs(stage, hoisted))


def _gradients(params: Shapes) -> Shapes:
    """Gradients add up in float32 or better, whatever the parameters are kept in."""
    return tuple(abstract(p.shape, jnp.promote_types(p.dtype, jnp.float32), p.sharding) for p in params)
