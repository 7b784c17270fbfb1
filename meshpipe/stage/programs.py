"""The compiled programs of a stage on its submesh."""

from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from meshpipe.compiler.compiler import Compiled, Compiler
from meshpipe.plan.plan import Op
from meshpipe.sharding import Arrays, Shapes, abstract, replicated, scalar_dtype
from meshpipe.stage.accumulate import AccumulatedOutputs, Accumulators, compile_reduce, compile_zeros, numbered
from meshpipe.stage.backward import BackwardParts
from meshpipe.stage.jaxpr import function_of
from meshpipe.stage.traced import TracedStage, split

Values = tuple[Arrays, ...]
"""The leaves of each value, or of the gradient of each value."""


@dataclass(frozen=True)
class StagePrograms:
    """A stage's compiled programs. Arrays go in and come out as flat tuples; `x` and output gradients are the leaves of
    all values, one value after the other.
    """

    prepare: Callable[..., list[jax.Array]] | None
    """Parameters, fixed state -> values computed once per step, where there are any."""
    zeros: Callable[[], tuple[Arrays, Arrays]]
    """Fresh accumulators of gradients (none for a forward-only stage), and totals (none for a stage without sums)."""
    forward: Callable[..., tuple[Values, Arrays, Arrays, Arrays]] | None = None
    """Parameters, hoisted, changing state (donated where forward overwrites it), x, inputs, microbatch, totals
    (donated) -> values, state, residuals, totals."""
    recompute: Callable[..., Arrays] | None = None
    """The arguments of `forward` up to the microbatch -> residuals; only where forward does not return them."""
    backward: Callable[..., tuple[Arrays, Values]] | None = None
    """Accumulators (donated), parameters, hoisted, inputs, microbatch, kept, residuals, output gradients
    -> accumulators, x gradients."""
    split: "SplitPrograms | None" = None
    """Backward in two parts, where the plan splits it."""
    forward_backward: Callable[..., tuple[Arrays, Values, Arrays, Arrays, Arrays]] | None = None
    """Forward and backward of the last stage in one, in place of both: accumulators (donated), parameters, hoisted,
    state, x, inputs, microbatch, totals (donated) -> accumulators, x gradients, state, totals, the loss."""
    reduce: Callable[..., tuple[Arrays, Arrays]] | None = None
    """Accumulators and totals, one by one (donated) -> accumulators, totals summed over the data axis, where
    microbatches are split over it."""

    def hoisted(self, params: Arrays, fixed: Arrays) -> Arrays:
        """What all microbatches of a step read: the state that forward does not change, and what is computed once."""
        return fixed if self.prepare is None else (*fixed, *self.prepare(params, fixed))


@dataclass(frozen=True)
class SplitPrograms:
    """A stage's backward in two parts."""

    input: Callable[..., tuple[Arrays, Values, Arrays]] | None
    """Accumulators (donated), parameters, hoisted, inputs, microbatch, kept, residuals, output gradients
    -> accumulators, x gradients, values that cross to the weight part. None where the weight part does it all: in a
    stage that is handed nothing with a gradient."""
    weight: Callable[..., Arrays] | None
    """Accumulators (donated), parameters, hoisted, inputs, microbatch, carried, crossed -> accumulators. None where the
    input part does it all."""
    carried: tuple[int, ...]
    """Which of the arrays `(*kept, *residuals, *output gradients)` the weight part reads again."""


def compile_stage(
    stage: TracedStage,
    ops: Set[Op],
    *,
    remat: str = "none",
    fused: bool = False,
    compiler: Compiler | None = None,
) -> StagePrograms:
    """Compiles each program of a stage once for its submesh; safe to run in a thread of its own.

    `ops` are the kinds of work that the plan asks for. With `fused`, forward and backward of the last stage are one
    program, and XLA decides what stays alive inside it. Only one microbatch is alive there at a time, so the
    rematerialisation `full` has no effect. XLA's CPU backend takes up to 1.8 times as long for one program as for two;
    a GPU takes 1.1 times as long for two as for one.
    """
    compiler = compiler or Compiler()
    mesh, forward_only = stage.spec.mesh, ops == {Op.FORWARD} or not stage.spec.has_backward
    # Where everything is recomputed, forward returns nothing for backward: its inputs are kept instead.
    hand_over = fused or not (forward_only or stage.recomputes(remat))
    programs: dict[str, Any]
    with jax.set_mesh(mesh):
        prepare, hoisted = _compile_prepare(stage, compiler)
        arguments = (stage.params, hoisted, stage.state, stage.x, stage.inputs, stage.microbatch)
        forward = _forward_part(stage, residuals=hand_over)
        totals = Accumulators.of(_totals(stage), [forward])
        if fused:
            # Residuals stay inside the one program, so nobody has to know how XLA shards them.
            parts = BackwardParts(stage, hoisted, stage.residuals, ops)
            gradients = parts.gradients
            both = _compile_forward_backward(stage, forward, parts, totals, arguments, compiler)
            programs = {"forward_backward": both}
        else:
            compiled = _compile_forward(stage, forward, totals, arguments, compiler)
            if forward_only:
                gradients, programs = Accumulators.of((), []), {}
            elif hand_over:
                # XLA has chosen the shardings of the residuals; backward is compiled for those, so none is moved.
                residuals = _like(compiled.out_info[2], compiled.output_shardings[2])
                gradients, programs = _compile_backwards(stage, hoisted, residuals, ops, compiler)
            else:
                # A program of its own, and not a part of backward: I and W of a split backward then share its result.
                again = _compile_recompute(stage, arguments, compiler)
                residuals = _like(again.out_info, again.output_shardings)
                gradients, programs = _compile_backwards(stage, hoisted, residuals, ops, compiler)
                programs["recompute"] = again
            programs["forward"] = compiled
        zeros = compile_zeros(gradients, totals, mesh, compiler)
        reduce = compile_reduce(gradients, totals, mesh, compiler)
        return StagePrograms(prepare=prepare, zeros=zeros, reduce=reduce, **programs)


def copy_stage(programs: StagePrograms, target: Mesh, compiler: Compiler) -> StagePrograms | None:
    """What `compile_stage` made with this compiler, for a stage that shares its trace; None if one cannot be copied."""
    # By identity: a program may stand in several fields, and compiled programs do not compare by what they compute.
    copies: dict[int, Any] = {}
    for part in (programs, programs.split):
        for program in vars(part).values() if part is not None else ():
            if isinstance(program, Compiled):
                copies[id(program)] = compiler.copy(program, target)
    # A stage that must compile one by itself needs a trace of its own, and compiles all from that.
    if None in copies.values():
        return None

    def copied(part: Any) -> Any:
        return replace(part, **{name: copies.get(id(value), value) for name, value in vars(part).items()})

    return copied(replace(programs, split=programs.split and copied(programs.split)))


def _forward_part(stage: TracedStage, *, residuals: bool) -> AccumulatedOutputs:
    """The traced forward; its sums, which follow the values that it hands on, are added to the totals."""
    totals = numbered(range(len(stage.sum_vars)), len(stage.output_vars))
    return AccumulatedOutputs(stage, stage.forward(outputs=True, residuals=residuals), totals)


def _compile_forward(
    stage: TracedStage, part: AccumulatedOutputs, totals: Accumulators, arguments: tuple[Any, ...], compiler: Compiler
) -> Compiled:
    mesh = stage.spec.mesh
    values = [boundary.on(mesh, stage.microbatch_size) for boundary in stage.boundaries_out]
    run = part.function(totals.unreduced)

    def forward(params, hoisted, state, x, inputs, microbatch, so_far):  # type: ignore[no-untyped-def]
        flat = run(*params, *hoisted, *state, *x, *inputs, microbatch)
        outputs, sums, new_state, fresh = _parts_of_forward(stage, flat)
        return (
            _like_values(values, outputs),
            tuple(new_state),
            tuple(fresh),
            totals.add(so_far, dict(enumerate(map(jnp.asarray, sums)))),
        )

    # XLA chooses the shardings of residuals, which are None here: only programs of this stage read them. Totals are
    # donated, so they are added to in place.
    results = (tuple(map(_shardings, values)), _shardings(stage.state), None, totals.shardings)
    donated = (2, 6) if stage.spec.overwrites_state else 6
    lowered = jax.jit(forward, out_shardings=results, donate_argnums=donated).lower(*arguments, totals.shapes)
    return compiler.compile(lowered, mesh)


def _parts_of_forward(stage: TracedStage, flat: Sequence[Any]) -> list[list[Any]]:
    """What a forward returns: values, sums, state and residuals."""
    sizes = len(stage.output_vars), len(stage.sum_vars), len(stage.state)
    return split(flat, (*sizes, len(flat) - sum(sizes)))


def _compile_recompute(stage: TracedStage, arguments: tuple[Any, ...], compiler: Compiler) -> Compiled:
    """A forward that returns only its residuals."""
    # Without state and sums, which advance once for each microbatch, in forward.
    run = function_of(stage.forward(outputs=False, residuals=True))
    again = jax.jit(lambda p, h, s, x, i, m: tuple(run(*p, *h, *s, *x, *i, m)))
    return compiler.compile(again.lower(*arguments), stage.spec.mesh)


def _compile_backwards(
    stage: TracedStage, hoisted: Shapes, residuals: Shapes, ops: Set[Op], compiler: Compiler
) -> tuple[Accumulators, dict[str, Any]]:
    """The accumulators of the gradients, and the backwards that the plan asks for by their field in `StagePrograms`."""
    parts = BackwardParts(stage, hoisted, residuals, ops)
    return parts.gradients, {
        "backward": _compile_backward(stage, parts, compiler) if parts.whole is not None else None,
        "split": _compile_split(stage, parts, compiler) if parts.split is not None else None,
    }


def _compile_backward(stage: TracedStage, parts: BackwardParts, compiler: Compiler) -> Compiled:
    assert parts.whole is not None
    sums = parts.gradients
    run = parts.whole.function(sums.unreduced)

    def backward(accumulators: Arrays, *arguments: Any) -> tuple[Arrays, Values]:
        flat = run(*jax.tree.leaves(arguments))
        gradients, into_x = flat[: len(accumulators)], flat[len(accumulators) :]
        # Added inside of the program, where XLA fuses the sum with what computes a gradient, and writes in place.
        return sums.add(accumulators, dict(enumerate(gradients))), _like_values(stage.x_gradients, into_x)

    results = (sums.shardings, tuple(map(_shardings, stage.x_gradients)))
    lowered = jax.jit(backward, donate_argnums=0, out_shardings=results).lower(sums.shapes, *parts.arguments)
    return _compile_backward_part(stage, lowered, compiler)


def _compile_forward_backward(
    stage: TracedStage,
    forward: AccumulatedOutputs,
    parts: BackwardParts,
    totals: Accumulators,
    arguments: tuple[Any, ...],
    compiler: Compiler,
) -> Compiled:
    assert not stage.boundaries_out
    assert parts.whole is not None
    gradients = parts.gradients
    run_forward, run_backward = forward.function(totals.unreduced), parts.whole.function(gradients.unreduced)

    def forward_backward(accumulators, params, hoisted, state, x, inputs, microbatch, so_far):  # type: ignore[no-untyped-def]
        flat = run_forward(*params, *hoisted, *state, *x, *inputs, microbatch)
        _, losses, new_state, fresh = _parts_of_forward(stage, flat)
        kept = [*(x[i] for i in stage.kept_x), *(state[i] for i in stage.kept_state)]
        values = [*params, *hoisted, *inputs, microbatch, *kept, *fresh]
        if parts.has_checkpoint:
            # Without barriers, XLA would merge what backward recomputes with forward, and keep what the policy drops.
            values = [jax.lax.optimization_barrier(value) for value in values]
        flat = run_backward(*values)
        found, into_x = flat[: len(accumulators)], flat[len(accumulators) :]
        return (
            gradients.add(accumulators, dict(enumerate(found))),
            _like_values(stage.x_gradients, into_x),
            tuple(new_state),
            totals.add(so_far, dict(enumerate(map(jnp.asarray, losses)))),
            tuple(losses[:1]),  # for observers to wait for: the totals are donated to the next microbatch
        )

    into = tuple(map(_shardings, stage.x_gradients))
    shardings = gradients.shardings, into, _shardings(stage.state), totals.shardings, None
    jitted = jax.jit(forward_backward, donate_argnums=(0, 7), out_shardings=shardings)
    return compiler.compile(jitted.lower(gradients.shapes, *arguments, totals.shapes), stage.spec.mesh)


def _compile_split(stage: TracedStage, parts: BackwardParts, compiler: Compiler) -> SplitPrograms:
    assert parts.split is not None
    cut, sums = parts.split, parts.gradients
    input_part = None if cut.has_no_input_part else _compile_input_part(stage, parts, compiler)
    if cut.is_whole:
        return SplitPrograms(input_part, None, ())
    run_weight = parts.weight.function(sums.unreduced)

    def backward_weight(accumulators: Arrays, *arguments: Any) -> Arrays:
        late = run_weight(*jax.tree.leaves(arguments))
        return sums.add(accumulators, dict(zip(cut.late, late, strict=True)))

    # The first four arguments are the same for all microbatches; the rest dies with one, except for what W reads.
    of_microbatch = jax.tree.leaves(parts.arguments[4:])
    carried = tuple(of_microbatch[i] for i in cut.carried)
    crossed = () if input_part is None else _like(input_part.out_info[2], input_part.output_shardings[2])
    jitted = jax.jit(backward_weight, donate_argnums=0, out_shardings=sums.shardings)
    lowered = jitted.lower(sums.shapes, *parts.arguments[:4], carried, crossed)
    return SplitPrograms(input_part, _compile_backward_part(stage, lowered, compiler), cut.carried)


def _compile_input_part(stage: TracedStage, parts: BackwardParts, compiler: Compiler) -> Any:
    assert parts.split is not None
    cut, sums, num_x = parts.split, parts.gradients, sum(map(len, stage.x_gradients))
    run_input = parts.input.function(sums.unreduced)

    def backward_input(accumulators: Arrays, *arguments: Any) -> tuple[Arrays, Values, Arrays]:
        flat = run_input(*jax.tree.leaves(arguments))
        into_x, crossing, early = split(flat, (num_x, len(cut.crossing), len(cut.early)))
        added = sums.add(accumulators, dict(zip(cut.early, early, strict=True)))
        return added, _like_values(stage.x_gradients, into_x), tuple(crossing)

    results = (sums.shardings, tuple(map(_shardings, stage.x_gradients)), None)
    lowered = jax.jit(backward_input, donate_argnums=0, out_shardings=results).lower(sums.shapes, *parts.arguments)
    return _compile_backward_part(stage, lowered, compiler)


def _compile_backward_part(stage: TracedStage, lowered: Any, compiler: Compiler) -> Any:
    return compiler.compile(lowered, stage.spec.mesh, stage.spec.target.backward_options)


def _like_values(values: Sequence[Shapes], leaves: Sequence[Any]) -> tuple[tuple[Any, ...], ...]:
    """The leaves of all values, grouped by value; a constant of the program is a number."""
    return tuple(map(tuple, split(leaves, [len(shapes) for shapes in values])))


def _totals(stage: TracedStage) -> Shapes:
    """What the stage adds up over microbatches: in the last stage the loss, its weight, and in evaluation metrics."""
    return (abstract((), scalar_dtype(), replicated(stage.spec.mesh)),) * len(stage.sum_vars)


def _compile_prepare(stage: TracedStage, compiler: Compiler) -> tuple[Callable[..., list[jax.Array]] | None, Shapes]:
    if not stage.prepared_vars:
        return None, stage.fixed_state
    run = function_of(stage.prepare())
    lowered = jax.jit(lambda params, fixed: tuple(run(*params, *fixed))).lower(stage.params, stage.fixed_state)
    prepare = compiler.compile(lowered, stage.spec.mesh)
    return prepare, (*stage.fixed_state, *_like(prepare.out_info, prepare.output_shardings))


def _shardings(shapes: Shapes) -> tuple[Any, ...]:
    return tuple(s.sharding for s in shapes)


def _like(shapes: Any, shardings: Any) -> Shapes:
    return tuple(abstract(s.shape, s.dtype, sharding) for s, sharding in zip(shapes, shardings, strict=True))
