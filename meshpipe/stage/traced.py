"""One stage, traced once together with its derivative, and the parts that its programs are made of."""

import copy
import enum
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Var
from jax.sharding import Mesh, NamedSharding

from meshpipe.sharding import (
    Arrays,
    Shapes,
    abstract,
    activation_sharding,
    batch_sharding,
    replicated,
    scalar_dtype,
    without_data,
)
from meshpipe.stage.jaxpr import (
    LAYOUT_PRIMITIVES,
    extract,
    function_of,
    hoistable_values,
    inline,
    invariant_values,
    variables,
)
from meshpipe.stage.residuals import least_to_keep
from meshpipe.stage.target import Target


@runtime_checkable
class StageFunction(Protocol):
    """What a stage computes on one microbatch, as a pure function of flat dictionaries.

    The last stage's returns scalars to add up over the microbatches, the first of which is the loss to differentiate:
    `(sum of losses, weight, ...)`. `randomness` is `(seed key data, path hashes, step, microbatch)`.
    """

    def __call__(
        self,
        params: dict[str, jax.Array],
        state: dict[str, jax.Array],
        activation: Any,
        batch: dict[str, jax.Array],
        randomness: tuple[jax.Array, jax.Array, jax.Array, jax.Array],
    ) -> tuple[Any, dict[str, jax.Array]]: ...


class Given(enum.Enum):
    """Inputs of a stage beside the fields of the batch, whose names are texts and so are none of these."""

    SEED = "seed"
    PATHS = "paths"
    """Hashes of the paths of random streams."""
    STEP = "step"


@dataclass(frozen=True)
class StageSpec:
    """One stage before tracing: its function, its place, and the shapes and shardings of what it owns."""

    index: int
    mesh: Mesh
    """Its submesh."""
    target: Target
    """What its programs are written for."""
    function: StageFunction
    params: Mapping[str, jax.ShapeDtypeStruct]
    state: Mapping[str, jax.ShapeDtypeStruct]
    is_first: bool
    is_last: bool
    streams: int = 0
    """How many random streams its layers have; a hash of the path of each is an input, in a uint32 array."""
    gathered: frozenset[str] = frozenset()
    """Parameters whose parts on the data axis are gathered for a step."""
    checkpoint_policy: Callable[..., bool] | None = None
    """What `jax.checkpoint` saves of the stage's forward; None leaves few bytes (`residuals.py`), `everything_saveable`
    all that the derivative reads."""


class Boundary:
    """The shape of the value that crosses from one stage to the next: any pytree of arrays."""

    def __init__(self, value: Any):
        self.leaves, self.treedef = jax.tree.flatten(value)
        self.differentiable = tuple(i for i, leaf in enumerate(self.leaves) if jnp.issubdtype(leaf.dtype, jnp.inexact))

    @property
    def kind(self) -> Hashable:
        """Equal for boundaries that a stage cannot tell apart."""
        return self.treedef, repr(self.treedef), tuple((leaf.shape, leaf.dtype) for leaf in self.leaves)

    def on(self, mesh: Mesh, microbatch_size: int) -> Shapes:
        """Its leaves as they lie on a submesh."""
        return tuple(
            abstract(v.shape, v.dtype, activation_sharding(mesh, v.shape, microbatch_size)) for v in self.leaves
        )

    def gradients_on(self, mesh: Mesh, microbatch_size: int) -> Shapes:
        """The gradients of its floating-point leaves as they lie on a submesh."""
        leaves = self.on(mesh, microbatch_size)
        return tuple(leaves[i] for i in self.differentiable)


def boundary_after(
    spec: StageSpec, boundary_in: Boundary | None, fields: Mapping[str, jax.ShapeDtypeStruct]
) -> Boundary:
    """What a stage that lives elsewhere hands on, found from shapes without its derivative.

    Arguments are those of `TracedStage`.
    """
    activation = None if boundary_in is None else jax.tree.unflatten(boundary_in.treedef, boundary_in.leaves)
    batch = {name: jax.ShapeDtypeStruct(field.shape[1:], field.dtype) for name, field in fields.items()}
    key = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))
    scalar = jax.ShapeDtypeStruct((), jnp.uint32)
    randomness = key, jax.ShapeDtypeStruct((spec.streams,), jnp.uint32), scalar, scalar

    def output(*arguments: Any) -> Any:
        return jax.tree.map(jnp.asarray, spec.function(*arguments)[0])

    with jax.set_mesh(spec.mesh):
        shapes = jax.eval_shape(output, dict(spec.params), dict(spec.state), activation, batch, randomness)
    return Boundary(shapes)


class TracedStage:
    """A stage's function traced with its derivative; the user's code runs once, here.

    `boundary_in` is what the previous stage hands over (None for the first), `fields` the shapes of one step's batch
    fields, `(num_microbatches, microbatch_size, ...)`.
    """

    def __init__(self, spec: StageSpec, boundary_in: Boundary | None, fields: Mapping[str, jax.ShapeDtypeStruct]):
        self.spec = spec
        self.boundary_in = boundary_in or Boundary(())
        self.fields = dict(fields)
        self.original: TracedStage | None = None
        """The stage whose trace this is, where it is that of another."""
        self.microbatch_size = next(iter(fields.values())).shape[1]
        mesh = spec.mesh
        self.params: Shapes = tuple(spec.params.values())
        self.x = self.boundary_in.on(mesh, self.microbatch_size)
        self.microbatch = abstract((), jnp.uint32, replicated(mesh))
        seed = abstract(
            jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0))).shape, jnp.uint32, replicated(mesh)
        )
        paths = abstract((spec.streams,), jnp.uint32, replicated(mesh))
        batch = (abstract(f.shape, f.dtype, batch_sharding(mesh)) for f in fields.values())
        inputs = (seed, paths, self.microbatch, *batch)

        with jax.set_mesh(mesh):
            closed, shapes = jax.make_jaxpr(self._forward_with_pullback, return_shape=True)(
                self.params, tuple(spec.state.values()), self.x, inputs, self.microbatch
            )
            closed = inline(closed)
        self.closed = extract(closed, closed.jaxpr.invars, closed.jaxpr.outvars, effects=True)
        (output, new_state), pullback = shapes
        self.boundary_out = None if spec.is_last else Boundary(output)
        self.pullback = jax.tree.structure(pullback)
        self._slice_variables(inputs, len(jax.tree.leaves(output)), len(new_state))

    def _forward_with_pullback(
        self, params: Arrays, state: Arrays, x: Arrays, inputs: Arrays, microbatch: jax.Array
    ) -> tuple[Any, Any]:
        spec, boundary = self.spec, self.boundary_in
        seed, paths, step, *fields = inputs
        in_step = zip(spec.params, params, self.params_in_step, strict=True)
        params = tuple(_gather(p, whole) if path in spec.gathered else p for path, p, whole in in_step)
        batch = {
            name: jax.lax.dynamic_index_in_dim(field, microbatch, keepdims=False)
            for name, field in zip(self.fields, fields, strict=True)
        }
        state_dict = dict(zip(spec.state, state, strict=True))

        def run(params: Arrays, floating: Arrays) -> tuple[Any, Any]:
            leaves = list(x)
            for i, leaf in zip(boundary.differentiable, floating, strict=True):
                leaves[i] = leaf
            activation = None if spec.is_first else jax.tree.unflatten(boundary.treedef, leaves)
            output, new_state = spec.function(
                dict(zip(spec.params, params, strict=True)),
                state_dict,
                activation,
                batch,
                (seed, paths, step, microbatch),
            )
            if spec.is_last:
                output = tuple(jnp.asarray(v, scalar_dtype()) for v in output)
                floating_out = [output[0]]
            else:
                output = jax.tree.map(jnp.asarray, output)
                floating_out = [v for v in jax.tree.leaves(output) if jnp.issubdtype(v.dtype, jnp.inexact)]
            return floating_out, (output, tuple(new_state[path] for path in spec.state))

        floating = tuple(x[i] for i in boundary.differentiable)
        if spec.checkpoint_policy is not None:
            run = jax.checkpoint(run, policy=spec.checkpoint_policy)
        _, pullback, results = jax.vjp(run, params, floating, has_aux=True)
        return results, pullback

    def _slice_variables(self, inputs: Shapes, num_outputs: int, num_state: int) -> None:
        """Names the inputs and outputs of the traced program, and decides what backward keeps."""
        jaxpr = self.closed.jaxpr
        sizes = (len(self.params), num_state, len(self.x), len(inputs), 1)
        self.param_vars, state_vars, self.x_vars, input_vars, (self.microbatch_var,) = split(jaxpr.invars, sizes)
        outputs, new_state_vars, self.pullback_vars = split(
            jaxpr.outvars, (num_outputs, num_state, len(jaxpr.outvars) - num_outputs - num_state)
        )
        self.output_vars = outputs
        self.changing = tuple(i for i, v in enumerate(state_vars) if new_state_vars[i] is not v)
        """Which leaves of the state forward changes; the others are no output of it, and are not kept for backward."""
        self.state_vars = [state_vars[i] for i in self.changing]
        self.new_state_vars = [new_state_vars[i] for i in self.changing]
        read = {v for e in jaxpr.eqns for v in variables(e.invars)} | set(variables(self.pullback_vars))
        self.fixed = tuple(i for i, v in enumerate(state_vars) if v in read and i not in self.changing)
        """Which leaves of the state are read and not changed."""
        self.fixed_vars = [state_vars[i] for i in self.fixed]
        self.prepared_vars = hoistable_values(jaxpr, [*self.param_vars, *self.fixed_vars])
        self.hoisted_vars = [*self.fixed_vars, *self.prepared_vars]
        """What is the same for all microbatches of a step: fixed state, and what is computed once."""
        used = {v for e in jaxpr.eqns for v in variables(e.invars)} | set(variables(jaxpr.outvars))
        kept_inputs = [i for i, v in enumerate(input_vars) if v in used]
        self.input_vars = [input_vars[i] for i in kept_inputs]
        self.inputs: Shapes = tuple(inputs[i] for i in kept_inputs)
        names = (*Given, *self.fields)
        self.input_names = tuple(names[i] for i in kept_inputs)
        """What this stage reads of what it is given and of the batch fields, in the order of its inputs."""

        # A microbatch is cut from the batch again for backward; what forward computes from it is kept like the rest.
        step_long = {*self.input_vars, self.microbatch_var}
        slices = {v for e in jaxpr.eqns if step_long & set(variables(e.invars)) for v in e.outvars}
        free = invariant_values(jaxpr, [*self.param_vars, *self.fixed_vars]) | step_long | slices
        residuals = [v for v in self.pullback_vars if isinstance(v, Var) and v not in free]
        kept = least_to_keep(jaxpr, residuals, free, lambda e: e.primitive.name in self._repeatable)
        self.residual_vars = [v for v in kept if v not in jaxpr.invars]
        needed = _reached(self.closed, self.pullback_vars, [*self.residual_vars, *self.hoisted_vars])
        self.kept_x = tuple(i for i, v in enumerate(self.x_vars) if v in needed)
        self.kept_state = tuple(i for i, v in enumerate(self.state_vars) if v in needed)

    @property
    def _repeatable(self) -> frozenset[str]:
        """The primitives of forward that backward may do again."""
        if self.spec.checkpoint_policy is jax.checkpoint_policies.everything_saveable:
            return LAYOUT_PRIMITIVES
        return self.spec.target.repeatable

    @property
    def params_in_step(self) -> Shapes:
        """The parameters as they lie while a step runs."""
        return tuple(
            abstract(p.shape, p.dtype, NamedSharding(p.sharding.mesh, without_data(p.sharding.spec)))
            if path in self.spec.gathered
            else p
            for path, p in self.spec.params.items()
        )

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
        """What forward leaves for backward, wherever XLA lays it."""
        return tuple(jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in self.residual_vars)  # type: ignore[attr-defined]

    def retraced(self) -> "TracedStage":
        """The stage traced for itself."""
        return TracedStage(self.spec, None if self.spec.is_first else self.boundary_in, self.fields)

    def shared_with(self, spec: StageSpec, boundary_in: Boundary) -> "TracedStage":
        """The trace used for a stage that computes the same from other leaves, on a submesh of the same shape.

        Its shapes lie on that submesh, but what is traced still speaks of this one: it tells what the programs take and
        keep, and is not to be compiled.
        """
        shared = copy.copy(self)
        shared.spec, shared.boundary_in, shared.original = spec, boundary_in, self
        shared.params = tuple(spec.params.values())
        shared.x = boundary_in.on(spec.mesh, self.microbatch_size)
        shared.microbatch, *inputs = (
            abstract(s.shape, s.dtype, NamedSharding(spec.mesh, s.sharding.spec))
            for s in (self.microbatch, *self.inputs)
        )
        shared.inputs = tuple(inputs)
        return shared

    def prepare(self) -> ClosedJaxpr:
        """Parameters, fixed state -> values computed from them alone, once per step (a cast to bfloat16)."""
        return extract(self.closed, [*self.param_vars, *self.fixed_vars], self.prepared_vars)

    def forward(self, *, outputs: bool, residuals: bool) -> ClosedJaxpr:
        """Parameters, hoisted values, changing state, x, inputs, microbatch -> output and state (with `outputs`),
        residuals.
        """
        wanted = [*self.output_vars, *self.new_state_vars] if outputs else []
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
        """Gradients of the parameters and of the floating-point leaves of x."""
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
        gradients, x_gradients = pullback(list(output_gradients))
        return gradients, x_gradients


def _apart(closed: ClosedJaxpr) -> Callable[..., list[Any]]:
    """A program as a function that XLA does not merge with other computations from the same arguments.

    As `jax.checkpoint` does it. XLA's CPU backend takes longer for both where it merges them; on a GPU it does not.
    """
    used = {v for e in closed.jaxpr.eqns for v in variables(e.invars)}

    def run(*arguments: jax.Array) -> list[Any]:
        given = dict(zip(closed.jaxpr.invars, arguments, strict=True))
        hidden = [jax.lax.optimization_barrier(a) if v in used else a for v, a in given.items()]
        results = function_of(closed)(*hidden)
        outputs = zip(closed.jaxpr.outvars, results, strict=True)
        return [given[v] if isinstance(v, Var) and v in given else result for v, result in outputs]

    return run


def _gather(param: jax.Array, whole: jax.ShapeDtypeStruct) -> jax.Array:
    """The parameter as a step has it, made once per step, as it comes of parameters alone.

    XLA by itself would split activations like the parameters now and then, and send those in every microbatch.
    """
    return jax.lax.with_sharding_constraint(param, whole.sharding.spec)


def split(values: Sequence[Any], sizes: Sequence[int]) -> list[list[Any]]:
    """Consecutive runs of the values, of the given lengths."""
    parts, start = [], 0
    for size in sizes:
        parts.append(list(values[start : start + size]))
        start += size
    return parts


def replaced(values: Arrays, places: Sequence[int], new: Arrays) -> Arrays:
    """The values with others in some places."""
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
