"""Traces a stage once, together with its derivative, and cuts the trace into the parts of its programs."""

import copy
import functools
import operator
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Var
from jax.sharding import NamedSharding

from meshpipe.sharding import (
    Arrays,
    Shapes,
    abstract,
    batch_sharding,
    replicated,
    scalar_dtype,
    without_data,
)
from meshpipe.stage.jaxpr import (
    LAYOUT_PRIMITIVES,
    extract,
    function_of,
    inline,
    invariant_values,
    variables,
)
from meshpipe.stage.prepared import gather, is_gather, values_to_prepare
from meshpipe.stage.residuals import least_to_keep
from meshpipe.stage.spec import Boundary, Given, StageSpec, on_submesh, unflattened


class TracedStage:
    """A stage's function, traced with its derivative. The user's code runs once, here.

    Arguments:
        spec: The stage.
        boundaries_in: What other stages hand over, a boundary for each value.
        fields: Shapes of one step's batch fields, `(num_microbatches, microbatch_size, ...)`.
    """

    def __init__(self, spec: StageSpec, boundaries_in: Sequence[Boundary], fields: Mapping[str, jax.ShapeDtypeStruct]):
        self.spec = spec
        self.boundaries_in = tuple(boundaries_in)
        self.fields = dict(fields)
        self.original: TracedStage | None = None
        """The stage that was traced, if this one shares its trace; else None."""
        self.has_objective = False
        """Whether it adds to the loss; its backward then starts from 1 there."""
        self.microbatch_size = next(iter(fields.values())).shape[1]
        mesh = spec.mesh
        self.params: Shapes = tuple(spec.params.values())
        self.x = on_submesh(self.boundaries_in, mesh, self.microbatch_size)
        """The leaves of all values that it is handed, one value after the other."""
        self.microbatch = abstract((), jnp.uint32, replicated(mesh))
        seed = abstract(
            jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0))).shape, jnp.uint32, replicated(mesh)
        )
        paths = abstract((spec.streams,), jnp.uint32, replicated(mesh))
        batch = (abstract(f.shape, f.dtype, batch_sharding(mesh, self.microbatch_size)) for f in fields.values())
        inputs = (seed, paths, self.microbatch, *batch)

        with jax.set_mesh(mesh):
            closed, shapes = jax.make_jaxpr(self._forward_with_pullback, return_shape=True)(
                self.params, tuple(spec.state.values()), self.x, inputs, self.microbatch
            )
            # The cuts below must see the dependencies inside nested calls.
            closed = inline(closed, derivatives=not spec.has_backward)
        # Tracing leaves equations behind that no output needs; they would count as readers of what they read.
        self.closed = extract(closed, closed.jaxpr.invars, closed.jaxpr.outvars, effects=True)
        (values, sums, new_state), pullback = shapes
        self.boundaries_out = tuple(map(Boundary, values))
        self.sum_names = tuple(sums)
        """The names of the sums that it adds up over the microbatches of a step, in the order of the program's
        outputs."""
        self.pullback = jax.tree.structure(pullback)
        self._slice_variables(inputs, len(jax.tree.leaves(values)), len(sums), len(new_state))

    def _forward_with_pullback(
        self, params: Arrays, state: Arrays, x: Arrays, inputs: Arrays, microbatch: jax.Array
    ) -> tuple[Any, Any]:
        spec, differentiable = self.spec, self.differentiable_x
        seed, paths, step, *fields = inputs
        in_step = zip(spec.params, params, self.params_in_step, strict=True)
        params = tuple(gather(p, whole) if path in spec.gathered else p for path, p, whole in in_step)
        # The program gets the fields of the whole batch and cuts its microbatch out: a slice made by the host would
        # cost a dispatch and a copy per microbatch.
        batch = {
            name: jax.lax.dynamic_index_in_dim(field, microbatch, keepdims=False)
            for name, field in zip(self.fields, fields, strict=True)
        }
        own_state = dict(zip(spec.state, state, strict=True))
        state_in_step = {
            path: gather(leaf, self._in_step(path, spec.state[path])) if path in spec.gathered else leaf
            for path, leaf in own_state.items()
        }

        def run(params: Arrays, floating: Arrays) -> tuple[Any, Any]:
            leaves = list(x)
            for i, leaf in zip(differentiable, floating, strict=True):
                leaves[i] = leaf
            values, sums, objective, new_state = spec.function(
                dict(zip(spec.params, params, strict=True)),
                state_in_step,
                unflattened(self.boundaries_in, leaves),
                batch,
                (seed, paths, step, microbatch),
            )
            values = jax.tree.map(jnp.asarray, values)
            floating_out = [v for v in jax.tree.leaves(values) if jnp.issubdtype(v.dtype, jnp.inexact)]
            self.has_objective = objective is not None
            if objective is not None:
                floating_out.append(jnp.asarray(objective, scalar_dtype()))
            # A plain dict would come back with its names sorted.
            scalars = OrderedDict((name, jnp.asarray(value, scalar_dtype())) for name, value in sums.items())
            # What is gathered are frozen parameters; they stay as they are, in parts.
            after = tuple(own_state[path] if path in spec.gathered else new_state[path] for path in spec.state)
            return floating_out, (values, scalars, after)

        floating = tuple(x[i] for i in differentiable)
        if not spec.has_backward:
            return run(params, floating)[1], None
        if spec.checkpoint_policy is not None:
            run = jax.checkpoint(run, policy=spec.checkpoint_policy)
        _, pullback, results = jax.vjp(run, params, floating, has_aux=True)
        return results, pullback

    def _slice_variables(self, inputs: Shapes, num_outputs: int, num_sums: int, num_state: int) -> None:
        """Names the inputs and outputs of the traced program, and decides what forward stores for backward."""
        jaxpr = self.closed.jaxpr
        sizes = (len(self.params), num_state, len(self.x), len(inputs), 1)
        self.param_vars, state_vars, self.x_vars, input_vars, (self.microbatch_var,) = split(jaxpr.invars, sizes)
        made = (num_outputs, num_sums, num_state)
        self.output_vars, self.sum_vars, new_state_vars, self.pullback_vars = split(
            jaxpr.outvars, (*made, len(jaxpr.outvars) - sum(made))
        )
        # The traced program returns all of the state. A leaf that is an input and an output would be copied in every
        # microbatch, and different microbatches would keep copies of the same values for backward.
        self.changing = tuple(i for i, v in enumerate(state_vars) if new_state_vars[i] is not v)
        """Which leaves of the state forward changes. The others are no outputs of forward, nor stored for backward."""
        self.state_vars = [state_vars[i] for i in self.changing]
        self.new_state_vars = [new_state_vars[i] for i in self.changing]
        read = {v for e in jaxpr.eqns for v in variables(e.invars)} | set(variables(self.pullback_vars))
        self.fixed = tuple(i for i, v in enumerate(state_vars) if v in read and i not in self.changing)
        """Which leaves of the state are read and not changed."""
        self.fixed_vars = [state_vars[i] for i in self.fixed]
        self.prepared_vars = values_to_prepare(jaxpr, [*self.param_vars, *self.fixed_vars])
        self.hoisted_vars = [*self.fixed_vars, *self.prepared_vars]
        """What is the same for all microbatches of a step: fixed state, and what is computed from it and the
        parameters."""
        # The batch fields that a stage does not read are not placed on its devices.
        used = {v for e in jaxpr.eqns for v in variables(e.invars)} | set(variables(jaxpr.outvars))
        kept_inputs = [i for i, v in enumerate(input_vars) if v in used]
        self.input_vars = [input_vars[i] for i in kept_inputs]
        self.inputs: Shapes = tuple(inputs[i] for i in kept_inputs)
        names = (*Given, *self.fields)
        self.input_names = tuple(names[i] for i in kept_inputs)
        """The batch fields and other inputs that this stage reads, in the order of its inputs."""

        # Backward cuts its microbatch from the batch again, since the batch stays on the devices for the whole step.
        # What forward computes from it is stored like the rest. Parameters are given as well: they are never among the
        # residuals, where XLA would copy them into every microbatch's outputs.
        step_long = {*self.input_vars, self.microbatch_var}
        slices = {v for e in jaxpr.eqns if step_long & set(variables(e.invars)) for v in e.outvars}
        free = invariant_values(jaxpr, [*self.param_vars, *self.fixed_vars]) | step_long | slices
        residuals = [v for v in self.pullback_vars if isinstance(v, Var) and v not in free]
        kept = least_to_keep(jaxpr, residuals, free, lambda e: e.primitive.name in self._repeatable)
        # Inputs of forward that backward reads are handed to both: returned from forward, they would be copied.
        self.residual_vars = [v for v in kept if v not in jaxpr.invars]
        needed = _reached(self.closed, self.pullback_vars, [*self.residual_vars, *self.hoisted_vars])
        self.kept_x = tuple(i for i, v in enumerate(self.x_vars) if v in needed)
        self.kept_state = tuple(i for i, v in enumerate(self.state_vars) if v in needed)

    @property
    def _repeatable(self) -> frozenset[str]:
        """The primitives of forward that backward may repeat."""
        if self.spec.checkpoint_policy is jax.checkpoint_policies.everything_saveable:
            return LAYOUT_PRIMITIVES
        return self.spec.target.repeatable

    @property
    def differentiable_x(self) -> tuple[int, ...]:
        """Which leaves of `x` are differentiated: the floating-point ones of values that have a gradient."""
        found: list[int] = []
        first = 0
        for boundary, has_gradient in zip(self.boundaries_in, self.spec.gradients_in, strict=True):
            found += [first + i for i in boundary.differentiable if has_gradient]
            first += len(boundary.leaves)
        return tuple(found)

    @property
    def x_gradients(self) -> tuple[Shapes, ...]:
        """Shapes and shardings of the gradients that it computes, for each value that it is handed and that has one."""
        values = zip(self.boundaries_in, self.spec.gradients_in, strict=True)
        return tuple(b.gradients_on(self.spec.mesh, self.microbatch_size) for b, has_one in values if has_one)

    @property
    def output_gradients(self) -> tuple[Shapes, ...]:
        """Shapes and shardings of the gradients that it is handed: for each value that it hands on, one of each reader,
        in the order of the readers.
        """
        if not self.spec.has_backward:
            return ()
        values = zip(self.boundaries_out, self.spec.readers, strict=True)
        return tuple(b.gradients_on(self.spec.mesh, self.microbatch_size) for b, count in values for _ in range(count))

    @property
    def params_in_step(self) -> Shapes:
        """Shapes and shardings of the parameters while a step runs."""
        return tuple(self._in_step(path, leaf) for path, leaf in self.spec.params.items())

    @property
    def fixed_state_in_step(self) -> Shapes:
        """Shapes and shardings of the state that is read and not changed, while a step runs."""
        owned = list(self.spec.state.items())
        return tuple(self._in_step(*owned[i]) for i in self.fixed)

    def _in_step(self, path: str, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        if path not in self.spec.gathered:
            return leaf
        return abstract(leaf.shape, leaf.dtype, NamedSharding(leaf.sharding.mesh, without_data(leaf.sharding.spec)))

    @property
    def state(self) -> Shapes:
        """The state that forward changes."""
        owned = tuple(self.spec.state.values())
        return tuple(owned[i] for i in self.changing)

    @property
    def fixed_paths(self) -> frozenset[str]:
        """The state that forward does not change, whether it reads it or not."""
        return frozenset(path for i, path in enumerate(self.spec.state) if i not in self.changing)

    @property
    def fixed_state(self) -> Shapes:
        """The state that is read and not changed."""
        owned = tuple(self.spec.state.values())
        return tuple(owned[i] for i in self.fixed)

    @property
    def residuals(self) -> Shapes:
        """Shapes of what forward stores for backward. XLA chooses the shardings."""
        return tuple(jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in self.residual_vars)  # type: ignore[attr-defined]

    def recomputes(self, remat: str) -> bool:
        """Whether forward returns nothing for backward, which computes it again. A stage without residuals, such as an
        embedding, has nothing to compute again.
        """
        return remat == "full" and bool(self.residual_vars)

    def retraced(self) -> "TracedStage":
        """The same stage with a trace of its own, where it shared that of another."""
        return TracedStage(self.spec, self.boundaries_in, self.fields)

    def shared_with(self, spec: StageSpec, boundaries_in: Sequence[Boundary]) -> "TracedStage":
        """A stage that shares this trace: it computes the same from other leaves, on a submesh of the same shape.

        Its shapes lie on its own submesh. The trace still names the submesh of the stage that was traced, so it serves
        to tell what the programs take and store, and must not be compiled: programs are copied (`copy_stage`).
        """
        shared = copy.copy(self)
        shared.spec, shared.boundaries_in, shared.original = spec, tuple(boundaries_in), self
        shared.params = tuple(spec.params.values())
        shared.x = on_submesh(boundaries_in, spec.mesh, self.microbatch_size)
        shared.microbatch, *inputs = (
            abstract(s.shape, s.dtype, NamedSharding(spec.mesh, s.sharding.spec))
            for s in (self.microbatch, *self.inputs)
        )
        shared.inputs = tuple(inputs)
        return shared

    def prepare(self) -> ClosedJaxpr:
        """Parameters, fixed state -> the values computed from them alone, once per step (a cast to bfloat16)."""
        return extract(self.closed, [*self.param_vars, *self.fixed_vars], self.prepared_vars)

    def forward(self, *, outputs: bool, residuals: bool) -> ClosedJaxpr:
        """Parameters, hoisted values, changing state, x, inputs, microbatch -> values, sums and state (with
        `outputs`), residuals.
        """
        wanted = [*self.output_vars, *self.sum_vars, *self.new_state_vars] if outputs else []
        return extract(
            self.closed,
            [
                *self.param_vars,
                *self.hoisted_vars,
                *self.state_vars,
                *self.x_vars,
                *self.input_vars,
                self.microbatch_var,
            ],
            [*wanted, *(self.residual_vars if residuals else [])],
            effects=outputs,
        )

    def pull_back(
        self,
        params: Arrays,
        hoisted: Arrays,
        inputs: Arrays,
        microbatch: jax.Array,
        kept: tuple[Arrays, Arrays],
        residuals: Arrays,
        output_gradients: Arrays,
    ) -> tuple[Arrays, Arrays]:
        """Gradients of the parameters, and of the floating-point leaves of all values that have a gradient."""
        # What is not stored is recomputed here, by the equations of forward; then JAX's own pullback takes its leaves
        # from the results, as if forward had just run.
        kept_vars = [*(self.x_vars[i] for i in self.kept_x), *(self.state_vars[i] for i in self.kept_state)]
        rebuild = extract(
            self.closed,
            [
                *self.param_vars,
                *self.hoisted_vars,
                *self.input_vars,
                self.microbatch_var,
                *kept_vars,
                *self.residual_vars,
            ],
            self.pullback_vars,
        )
        arguments = (*params, *hoisted, *inputs, microbatch, *kept[0], *kept[1], *residuals)
        run = _apart(rebuild) if self.spec.target.rebuilds_apart else function_of(rebuild)
        leaves = run(*arguments)
        pullback = jax.tree.unflatten(self.pullback, leaves)
        seeds = self._added(output_gradients)
        if self.has_objective:
            seeds.append(jnp.ones((), scalar_dtype()))  # the derivative of the sum of the losses by itself
        gradients, x_gradients = pullback(seeds)
        return gradients, x_gradients

    def _added(self, output_gradients: Arrays) -> list[jax.Array]:
        """The gradient of every floating-point leaf that it hands on, from those of all readers.

        They are added here, in the order in which backward passes the readers, and not as they arrive: so the sum is
        the same whatever the schedule and wherever the readers live, and the same as without a pipeline.
        """
        rest, gradients = iter(output_gradients), []
        for boundary, readers in zip(self.boundaries_out, self.spec.readers, strict=True):
            of_readers = [[next(rest) for _ in boundary.differentiable] for _ in range(readers)]
            gradients += [functools.reduce(operator.add, of_leaf) for of_leaf in zip(*of_readers[::-1], strict=True)]
        return gradients


def _apart(closed: ClosedJaxpr) -> Callable[..., list[Any]]:
    """A program as a function that XLA does not merge with other computations from the same arguments.

    `jax.checkpoint` hides its arguments in the same way. Without that, XLA's CPU backend finds what backward computes
    from the same values, merges both, and takes longer for them than for two loops. On a GPU it does not.
    """
    used = {v for e in closed.jaxpr.eqns if not is_gather(e) for v in variables(e.invars)}

    def run(*arguments: jax.Array) -> list[Any]:
        given = dict(zip(closed.jaxpr.invars, arguments, strict=True))
        # An argument that is only gathered or handed on is not computed with, so nothing can be merged.
        hidden = [jax.lax.optimization_barrier(a) if v in used else a for v, a in given.items()]
        results = function_of(closed)(*hidden)
        outputs = zip(closed.jaxpr.outvars, results, strict=True)
        return [given[v] if isinstance(v, Var) and v in given else result for v, result in outputs]

    return run


def split(values: Sequence[Any], sizes: Sequence[int]) -> list[list[Any]]:
    """Consecutive runs of the values, of the given lengths."""
    parts, start = [], 0
    for size in sizes:
        parts.append(list(values[start : start + size]))
        start += size
    return parts


def replaced(values: Arrays, places: Sequence[int], new: Arrays) -> Arrays:
    """The values, with new ones in some places."""
    result = list(values)
    for place, value in zip(places, new, strict=True):
        result[place] = value
    return tuple(result)


def _reached(closed: ClosedJaxpr, outputs: Sequence[Any], stops: Sequence[Var]) -> set[Var]:
    """The inputs of the program that the outputs need, when the values in `stops` are given."""
    part = extract(closed, [*closed.jaxpr.invars, *stops], outputs)
    return {v for e in part.jaxpr.eqns for v in e.invars if isinstance(v, Var)} | {
        v for v in part.jaxpr.outvars if isinstance(v, Var)
    }
