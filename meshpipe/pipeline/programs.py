"""The compiled programs of a stage on its submesh."""

from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr
from jax.sharding import Mesh

from meshpipe.compiler import Compiler
from meshpipe.pipeline.jaxpr import function_of
from meshpipe.pipeline.plan import Op
from meshpipe.pipeline.split_backward import SplitBackward
from meshpipe.pipeline.stage import Arrays, Shapes, TracedStage, split
from meshpipe.sharding import abstract, replicated


@dataclass(frozen=True)
class StagePrograms:
    """A stage's compiled programs; arrays go in and come out as flat tuples."""

    prepare: Callable[..., list[jax.Array]] | None
    """Parameters -> hoisted values, where there are any."""
    zeros: Callable[[], Arrays]
    """Fresh gradient accumulators; none for a forward-only stage."""
    forward: Callable[..., tuple[Arrays, Arrays, Arrays, Arrays]]
    """Parameters, hoisted, state, x, inputs, microbatch, totals -> output, state, residuals, totals."""
    recompute: Callable[..., Arrays] | None
    """The same up to the microbatch -> residuals, where forward does not hand them over."""
    backward: Callable[..., tuple[Arrays, Arrays]] | None
    """Accumulators (donated), parameters, hoisted, inputs, microbatch, kept, residuals, output gradients
    -> accumulators, x gradients."""
    split: "SplitPrograms | None" = None
    """Backward in two parts, where the plan has it so."""


@dataclass(frozen=True)
class SplitPrograms:
    """A stage's backward in two parts."""

    input: Callable[..., tuple[Arrays, Arrays, Arrays]]
    """Accumulators (donated), parameters, hoisted, inputs, microbatch, kept, residuals, output gradients
    -> accumulators, x gradients, values that cross to the weight part."""
    weight: Callable[..., Arrays] | None
    """Accumulators (donated), parameters, hoisted, inputs, microbatch, carried, crossed -> accumulators.

    None where the input part does it all."""
    carried: tuple[int, ...]
    """Which of the arrays `(*kept, *residuals, *output gradients)` the weight part reads again."""


def compile_stage(
    stage: TracedStage, ops: Set[Op], *, remat: str = "none", compiler: Compiler | None = None
) -> StagePrograms:
    """Compiles each program of a stage once for its submesh; safe to run in a thread of its own.

    Forward, with the loss on the last stage, and backward stay two programs also where one follows the other at once:
    XLA's CPU backend takes up to 1.8 times longer for both in one. `ops` are the kinds of work that the plan asks for.
    """
    compiler = compiler or Compiler()
    forward_only = ops == {Op.FORWARD}
    hand_over = remat != "full" and not forward_only
    with jax.set_mesh(stage.spec.mesh):
        prepare, hoisted = _compile_prepare(stage, compiler)
        arguments = (stage.params, hoisted, stage.state, stage.x, stage.inputs, stage.microbatch)
        forward = _compile_forward(stage, arguments, compiler, residuals=hand_over)
        if forward_only:
            return StagePrograms(prepare, tuple, forward, None, None)
        recompute = None
        if hand_over:
            residuals = _like(forward.out_info[2], forward.output_shardings[2])
        else:
            run_again = function_of(stage.forward(outputs=False, residuals=True))
            again = jax.jit(lambda p, h, s, x, i, m: tuple(run_again(*p, *h, *s, *x, *i, m)))
            recompute = compiler.compile(again.lower(*arguments), stage.spec.mesh)
            residuals = _like(recompute.out_info, recompute.output_shardings)
        accumulators = _accumulators(stage)
        make_zeros = jax.jit(
            lambda: tuple(jnp.zeros(a.shape, a.dtype) for a in accumulators), out_shardings=_shardings(accumulators)
        )
        example = _backward_arguments(stage, hoisted, residuals)
        backward = _compile_backward(stage, accumulators, example, compiler) if Op.BACKWARD in ops else None
        split_programs = None
        if Op.BACKWARD_INPUT in ops:
            parts = trace_split(stage, hoisted, residuals)
            split_programs = _compile_split(stage, parts, accumulators, example, compiler)
        zeros = compiler.compile(make_zeros.lower(), stage.spec.mesh)
        return StagePrograms(prepare, zeros, forward, recompute, backward, split_programs)


def copy_stage(programs: StagePrograms, target: Mesh, compiler: Compiler) -> StagePrograms | None:
    """What `compile_stage` made with this compiler, for a twin of the stage; None where a program cannot be copied."""
    copies: dict[int, Any] = {}
    for part in (programs, programs.split):
        for program in vars(part).values() if part is not None else ():
            if isinstance(program, jax.stages.Compiled):
                copies[id(program)] = compiler.copy(program, target)
    if None in copies.values():
        return None

    def copied(part: Any) -> Any:
        return replace(part, **{name: copies.get(id(value), value) for name, value in vars(part).items()})

    return copied(replace(programs, split=programs.split and copied(programs.split)))


def _compile_forward(
    stage: TracedStage, arguments: tuple[Any, ...], compiler: Compiler, *, residuals: bool
) -> jax.stages.Compiled:
    mesh, boundary = stage.spec.mesh, stage.boundary_out
    output: Shapes = () if boundary is None else boundary.on(mesh, stage.microbatch_size)
    num_outputs, num_state = len(stage.output_vars), len(stage.state)
    totals: Shapes = (abstract((), jnp.float32, replicated(mesh)),) * num_outputs if boundary is None else ()
    run = function_of(stage.forward(outputs=True, residuals=residuals))

    def forward(params, hoisted, state, x, inputs, microbatch, totals):  # type: ignore[no-untyped-def]
        flat = run(*params, *hoisted, *state, *x, *inputs, microbatch)
        outputs, new_state, fresh = split(flat, (num_outputs, num_state, len(flat) - num_outputs - num_state))
        if boundary is None:
            outputs, totals = [], tuple(t + o for t, o in zip(totals, outputs, strict=True))
        return tuple(outputs), tuple(new_state), tuple(fresh), totals

    results = (_shardings(output), _shardings(stage.state), None, _shardings(totals))
    lowered = jax.jit(forward, out_shardings=results, donate_argnums=6).lower(*arguments, totals)
    return compiler.compile(lowered, mesh)


def _backward_arguments(stage: TracedStage, hoisted: Shapes, residuals: Shapes) -> tuple[Any, ...]:
    """Shapes of what a backward takes after the accumulators."""
    boundary = stage.boundary_out
    output_gradients = () if boundary is None else boundary.gradients_on(stage.spec.mesh, stage.microbatch_size)
    kept = tuple(stage.x[i] for i in stage.kept_x), tuple(stage.state[i] for i in stage.kept_state)
    return stage.params, hoisted, stage.inputs, stage.microbatch, kept, residuals, output_gradients


def _pull_back(stage: TracedStage, arguments: tuple[Any, ...]) -> tuple[Arrays, Arrays]:
    params, hoisted, inputs, microbatch, kept, residuals, output_gradients = arguments
    seeds = (jnp.ones((), jnp.float32),) if stage.boundary_out is None else output_gradients
    gradients, into_x = stage.pull_back(params, hoisted, inputs, microbatch, kept, residuals, seeds)
    return tuple(gradients), tuple(into_x)


def _compile_backward(
    stage: TracedStage, accumulators: Shapes, example: tuple[Any, ...], compiler: Compiler
) -> jax.stages.Compiled:
    def backward(accumulators: Arrays, *arguments: Any) -> tuple[Arrays, Arrays]:
        gradients, into_x = _pull_back(stage, arguments)
        return _add(accumulators, dict(enumerate(gradients))), into_x

    results = (_shardings(accumulators), _shardings(_x_gradients(stage)))
    lowered = jax.jit(backward, donate_argnums=0, out_shardings=results).lower(accumulators, *example)
    return compiler.compile(lowered, stage.spec.mesh)


def trace_backward(stage: TracedStage, hoisted: Shapes, residuals: Shapes) -> ClosedJaxpr:
    """The stage's backward traced: gradients of its parameters, then of its input."""
    example = _backward_arguments(stage, hoisted, residuals)
    return jax.make_jaxpr(lambda *arguments: _pull_back(stage, arguments))(*example)


def trace_split(stage: TracedStage, hoisted: Shapes, residuals: Shapes) -> SplitBackward:
    """The same cut in two; nothing is compiled."""
    num_step_inputs = len(stage.params) + len(hoisted) + len(stage.inputs) + 1
    return SplitBackward(trace_backward(stage, hoisted, residuals), len(stage.params), num_step_inputs)


def _compile_split(
    stage: TracedStage, parts: SplitBackward, accumulators: Shapes, example: tuple[Any, ...], compiler: Compiler
) -> SplitPrograms:
    run_input, num_x = function_of(parts.input_part()), len(_x_gradients(stage))

    def backward_input(accumulators: Arrays, *arguments: Any) -> tuple[Arrays, Arrays, Arrays]:
        flat = run_input(*jax.tree.leaves(arguments))
        into_x, crossing, early = split(flat, (num_x, len(parts.crossing), len(parts.early)))
        return _add(accumulators, dict(zip(parts.early, early, strict=True))), tuple(into_x), tuple(crossing)

    results = (_shardings(accumulators), _shardings(_x_gradients(stage)), None)
    lowered = jax.jit(backward_input, donate_argnums=0, out_shardings=results).lower(accumulators, *example)
    input_part = compiler.compile(lowered, stage.spec.mesh)
    if parts.is_whole:
        return SplitPrograms(input_part, None, ())
    run_weight = function_of(parts.weight_part())

    def backward_weight(accumulators: Arrays, *arguments: Any) -> Arrays:
        late = run_weight(*jax.tree.leaves(arguments))
        return _add(accumulators, dict(zip(parts.late, late, strict=True)))

    of_microbatch = jax.tree.leaves(example[4:])
    carried = tuple(of_microbatch[i] for i in parts.carried)
    crossed = _like(input_part.out_info[2], input_part.output_shardings[2])
    jitted = jax.jit(backward_weight, donate_argnums=0, out_shardings=_shardings(accumulators))
    weight_part = compiler.compile(jitted.lower(accumulators, *example[:4], carried, crossed), stage.spec.mesh)
    return SplitPrograms(input_part, weight_part, parts.carried)


def _add(accumulators: Arrays, gradients: Mapping[int, jax.Array]) -> Arrays:
    return tuple(a + gradients[i].astype(a.dtype) if i in gradients else a for i, a in enumerate(accumulators))


def _x_gradients(stage: TracedStage) -> Shapes:
    return stage.boundary_in.gradients_on(stage.spec.mesh, stage.microbatch_size)


def _accumulators(stage: TracedStage) -> Shapes:
    """Gradients add up in float32 or better, whatever the parameters are kept in."""
    return tuple(abstract(p.shape, jnp.promote_types(p.dtype, jnp.float32), p.sharding) for p in stage.params)


def _compile_prepare(stage: TracedStage, compiler: Compiler) -> tuple[Callable[..., list[jax.Array]] | None, Shapes]:
    if not stage.hoisted_vars:
        return None, ()
    run = function_of(stage.prepare())
    lowered = jax.jit(lambda params: tuple(run(*params))).lower(stage.params)
    prepare = compiler.compile(lowered, stage.spec.mesh)
    return prepare, _like(prepare.out_info, prepare.output_shardings)


def _shardings(shapes: Shapes) -> tuple[Any, ...]:
    return tuple(s.sharding for s in shapes)


def _like(shapes: Any, shardings: Any) -> Shapes:
    return tuple(abstract(s.shape, s.dtype, sharding) for s, sharding in zip(shapes, shardings, strict=True))
