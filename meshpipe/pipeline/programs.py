"""The compiled programs of a stage on its submesh."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from meshpipe.pipeline.jaxpr import function_of
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


def compile_stage(stage: TracedStage, *, remat: str = "none", forward_only: bool = False) -> StagePrograms:
    """Compiles each program of a stage once for its submesh; safe to run in a thread of its own.

    Forward, with the loss on the last stage, and backward stay two programs also where one follows the other at once:
    XLA's CPU backend takes up to 1.8 times longer for both in one.
    """
    hand_over = remat == "none" and not forward_only
    with jax.set_mesh(stage.spec.mesh):
        prepare, hoisted = _compile_prepare(stage)
        arguments = (stage.params, hoisted, stage.state, stage.x, stage.inputs, stage.microbatch)
        forward = _compile_forward(stage, arguments, residuals=hand_over)
        if forward_only:
            return StagePrograms(prepare, tuple, forward, None, None)
        recompute = None
        if hand_over:
            residuals = _like(forward.out_info[2], forward.output_shardings[2])
        else:
            run_again = function_of(stage.forward(outputs=False, residuals=True))
            again = jax.jit(lambda p, h, s, x, i, m: tuple(run_again(*p, *h, *s, *x, *i, m)))
            recompute = again.lower(*arguments).compile()
            residuals = _like(recompute.out_info, recompute.output_shardings)
        accumulators = _accumulators(stage)
        zeros = jax.jit(
            lambda: tuple(jnp.zeros(a.shape, a.dtype) for a in accumulators), out_shardings=_shardings(accumulators)
        )
        backward = _compile_backward(stage, accumulators, hoisted, residuals)
        return StagePrograms(prepare, zeros.lower().compile(), forward, recompute, backward)


def _compile_forward(stage: TracedStage, arguments: tuple[Any, ...], *, residuals: bool) -> jax.stages.Compiled:
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
    return jax.jit(forward, out_shardings=results, donate_argnums=6).lower(*arguments, totals).compile()


def _compile_backward(
    stage: TracedStage, accumulators: Shapes, hoisted: Shapes, residuals: Shapes
) -> jax.stages.Compiled:
    mesh, boundary, size = stage.spec.mesh, stage.boundary_out, stage.microbatch_size
    output_gradients = () if boundary is None else boundary.gradients_on(mesh, size)
    x_gradients = stage.boundary_in.gradients_on(mesh, size)
    kept = tuple(stage.x[i] for i in stage.kept_x), tuple(stage.state[i] for i in stage.kept_state)

    def backward(accumulators, params, hoisted, inputs, microbatch, kept, residuals, output_gradients):  # type: ignore[no-untyped-def]
        seeds = (jnp.ones((), jnp.float32),) if boundary is None else output_gradients
        gradients, into_x = stage.pull_back(params, hoisted, inputs, microbatch, kept, residuals, seeds)
        return tuple(a + g.astype(a.dtype) for a, g in zip(accumulators, gradients, strict=True)), tuple(into_x)

    arguments = (accumulators, stage.params, hoisted, stage.inputs, stage.microbatch, kept, residuals, output_gradients)
    results = (_shardings(accumulators), _shardings(x_gradients))
    return jax.jit(backward, donate_argnums=0, out_shardings=results).lower(*arguments).compile()


def _accumulators(stage: TracedStage) -> Shapes:
    """Gradients add up in float32 or better, whatever the parameters are kept in."""
    return tuple(abstract(p.shape, jnp.promote_types(p.dtype, jnp.float32), p.sharding) for p in stage.params)


def _compile_prepare(stage: TracedStage) -> tuple[Callable[..., list[jax.Array]] | None, Shapes]:
    if not stage.hoisted_vars:
        return None, ()
    run = function_of(stage.prepare())
    prepare = jax.jit(lambda params: tuple(run(*params))).lower(stage.params).compile()
    return prepare, _like(prepare.out_info, prepare.output_shardings)


def _shardings(shapes: Shapes) -> tuple[Any, ...]:
    return tuple(s.sharding for s in shapes)


def _like(shapes: Any, shardings: Any) -> Shapes:
    return tuple(abstract(s.shape, s.dtype, sharding) for s, sharding in zip(shapes, shardings, strict=True))
