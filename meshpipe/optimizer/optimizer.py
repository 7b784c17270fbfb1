"""Optax on every stage, and what crosses stages: the global norm, and clipping by it."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from meshpipe.compiler.compiler import Compiler
from meshpipe.compiler.digest import digest
from meshpipe.optimizer.parameters import StageParameters
from meshpipe.optimizer.separable import call_of_optimizer, describe_updates, kinds_and_frozen
from meshpipe.optimizer.state import state_shapes
from meshpipe.optimizer.sums import LOSS, WEIGHT, further_sums, is_term, name_of_mean, weight_of
from meshpipe.pipeline.transfer import transfer_between
from meshpipe.processes.agreement import HASH
from meshpipe.sharding import Arrays, abstract, is_local, place, replicated, scalar_dtype
from meshpipe.stage.traced import replaced

Move = Callable[[Arrays | None], Arrays | None]


class Scalars(NamedTuple):
    """The scalars of an update, in every process."""

    loss: jax.Array
    """Mean over the whole batch; 0 if the weight of the batch is 0."""
    norm: jax.Array
    """Global norm of the gradient before clipping; 0 if the weight of the batch is 0."""
    good: jax.Array
    """Whether loss, terms and norm are finite, and those of every update since the last `reset`."""
    applied: jax.Array
    """Whether the update was made: it is good, and the weight of the batch is not 0."""
    terms: dict[str, jax.Array]
    """The terms that layers add to the loss, by name: means over the whole batch, as the loss is."""
    metrics: dict[str, jax.Array]
    """Means of what layers sow for the metrics, by name."""


class Optimizer:
    """Updates every stage's parameters on their own devices, from the gradients of the summed loss.

    The loss is normalised once, by the weight of the whole batch; the global norm counts every parameter once,
    but none that the transformation keeps frozen. A step
    whose loss or gradients are not finite leaves parameters, optimizer and state as they were, and so do all steps
    after it until `reset`. A step whose weight is 0 has no mean, and leaves them as they were too, but does not affect
    later steps. `name` is the prefix of the names of its transfers.

    Raises `ValueError` for a transformation that mixes gradients of different stages.
    """

    def __init__(
        self,
        transformation: optax.GradientTransformation,
        stages: Sequence[StageParameters],
        clip_norm: float | None = None,
        name: str = "optimizer",
    ):
        self._kinds, unused = kinds_and_frozen(transformation, [stage.owned for stage in stages])
        self.unused = unused
        """The paths of parameters whose gradients no update uses, now or later."""
        self._transformation = transformation
        self._stages = stages
        self._clip_norm = clip_norm
        self._sums = further_sums(name for stage in stages for name in stage.sums)
        self._means = tuple(name for name in self._sums if weight_of(name) is not None)
        """The sums of which means are reported."""
        self._last = replicated(stages[-1].mesh)
        self._everywhere = [replicated(stage.mesh) for stage in stages]
        self.state_shapes = [state_shapes(transformation, stage) for stage in stages]
        self._inits: dict[int, Any] = {}
        self._norms: dict[int, Any] = {}
        self._updates: dict[int, Any] = {}
        self._local = [i for i, stage in enumerate(stages) if is_local(stage.mesh)]
        self._changing = {
            i: [k for k, path in enumerate(stages[i].state) if path not in stages[i].fixed] for i in self._local
        }
        self._read_after_step = {
            i: [k for k, path in enumerate(stages[i].state) if path in stages[i].read_after_step] for i in self._local
        }
        self._last_is_local = is_local(stages[-1].mesh)
        self._up, self._down = self._links(name)
        self._nothing = {i: place(np.zeros((), scalar_dtype()), self._everywhere[i]) for i in self._local}
        self.reset()
        self.finite: dict[int, jax.Array] = {i: place(np.bool_(True), self._everywhere[i]) for i in self._local}
        """For each local stage, whether the last update left its parameters finite."""

    def _links(self, name: str) -> tuple[dict[int, Move], dict[int, Move]]:
        """Transfers of sums of squares, and of what else stages add up, from each stage to its parent, and of scalars
        back, where one end is in this process.
        """
        up: dict[int, Move] = {}
        down: dict[int, Move] = {}
        for i, stage in enumerate(self._stages[:-1]):
            above = parent(i, len(self._stages))
            if i in self._local or above in self._local:
                scalar = abstract((), scalar_dtype(), self._everywhere[i])
                # Loss, norm, what is good and further means are read in every process.
                flag = abstract((), jnp.bool_, self._everywhere[i])
                scalars = (scalar, flag, scalar, scalar, flag, *[scalar] * len(self._means))
                square = abstract((), scalar_dtype(), self._everywhere[above])
                mesh = self._stages[above].mesh
                up[i] = transfer_between(f"{name}/norm {i}", stage.mesh, (square,) * (1 + len(self._sums)))
                down[i] = transfer_between(
                    f"{name}/scale {i}", mesh, scalars if jax.process_count() > 1 else scalars[:2]
                )
        return up, down

    def description(self) -> dict[str, str]:
        """What must be the same in every process: by name, in words or as a hash."""
        found = describe_updates(self._transformation, [stage.owned for stage in self._stages], self._kinds)
        for s, shapes in enumerate(self.state_shapes):
            leaves, treedef = jax.tree.flatten(shapes)
            kept = [str(treedef), [(str(leaf.dtype), leaf.shape, leaf.sharding.spec) for leaf in leaves]]
            found[f"optimizer state of stage {s}"] = HASH + digest(kept)
        return found

    def init(self, params: Mapping[int, Arrays]) -> dict[int, Any]:
        """Optax's state of every local stage, made on its submesh."""
        compiler = Compiler()
        states = {}
        for index, leaves in params.items():
            program = self._inits.get(index) or self._compile_init(index, compiler)
            states[index] = jax.tree.unflatten(jax.tree.structure(self.state_shapes[index]), program(leaves))
        return states

    def _compile_init(self, index: int, compiler: Compiler) -> Any:
        stage, shapes = self._stages[index], self.state_shapes[index]

        def init(params: Arrays) -> list[jax.Array]:
            named = dict(zip(stage.params, params, strict=True))
            return jax.tree.leaves(self._transformation.init({path: named[path] for path in stage.owned}))

        shardings = [shape.sharding for shape in jax.tree.leaves(shapes)]
        return compiler.compile(jax.jit(init, out_shardings=shardings).lower(tuple(stage.params.values())), stage.mesh)

    def reset(self) -> None:
        """Lets updates happen again after a step that was not finite."""
        where = self._last if self._last_is_local else self._everywhere[self._local[0]]
        self.good: jax.Array = place(np.bool_(True), where)

    def compile(self, compiler: Compiler | None = None) -> None:
        """Compiles what `init` and `update` run, in threads.

        Programs see leaves without their paths, so stages of equal shapes that are updated alike share them: the first
        stage is traced and compiled, the others get copies.
        """
        programs = compiler or Compiler()
        firsts: dict[Hashable, int] = {}
        for index in self._local:
            firsts.setdefault(self._kind(index), index)

        def copy_stage(index: int) -> None:
            first = firsts[self._kind(index)]
            for found in (self._norms, self._updates, self._inits):
                copy = programs.copy(found[first], self._stages[index].mesh)
                if copy is None:
                    return compile_stage(index)
                found[index] = copy
            return None

        def compile_stage(index: int) -> None:
            stage, treedef = self._stages[index], jax.tree.structure(self.state_shapes[index])
            opt_state = jax.tree.leaves(self.state_shapes[index])
            update_tree = self._update(stage)

            def update(params, leaves, *arguments):  # type: ignore[no-untyped-def]
                changed, new_state, *others = update_tree(params, jax.tree.unflatten(treedef, leaves), *arguments)
                return changed, jax.tree.leaves(new_state), *others

            gradients = _accumulators(stage)
            scalar = abstract((), scalar_dtype(), self._everywhere[index])
            applied = abstract((), jnp.bool_, self._everywhere[index])
            params, state = tuple(stage.params.values()), tuple(stage.changing.values())
            shardings = jax.tree.map(lambda s: s.sharding, (params, opt_state, state, applied))
            summed = jax.jit(self._add(stage), out_shardings=self._everywhere[index])
            own, below = (scalar,) * len(stage.sums), (scalar,) * (1 + len(self._sums))
            self._norms[index] = programs.compile(summed.lower(gradients, own, (below, below)), stage.mesh)
            jitted = jax.jit(update, donate_argnums=(0, 1), out_shardings=shardings)
            read = tuple(stage.read_after_step.values())
            arguments = (params, opt_state, gradients, state, state, scalar, applied, read)
            self._updates[index] = programs.compile(jitted.lower(*arguments), stage.mesh)
            self._inits[index] = self._compile_init(index, programs)

        def compile_summary() -> None:
            scalar, good = abstract((), scalar_dtype(), self._last), abstract((), jnp.bool_, self._last)
            summary = jax.jit(self._summary, out_shardings=self._last)
            lowered = summary.lower((scalar,) * (1 + len(self._sums)), (scalar, scalar), good)
            self._summarise = programs.compile(lowered, self._stages[-1].mesh)

        with ThreadPoolExecutor() as pool:
            originals = [pool.submit(compile_stage, index) for index in firsts.values()]
            if self._last_is_local:
                originals.append(pool.submit(compile_summary))
            for original in originals:
                original.result()
            list(pool.map(copy_stage, [index for index in self._local if index not in firsts.values()]))

    def _kind(self, index: int) -> Hashable:
        """A key that is equal for stages that can share a program."""
        stage = self._stages[index]
        leaves = [*stage.params.values(), *stage.changing.values(), *jax.tree.leaves(self.state_shapes[index])]
        shapes = tuple((leaf.shape, leaf.dtype, leaf.sharding.spec) for leaf in leaves)
        borrowed = tuple(path in stage.borrowed for path in stage.params)
        alone = index if self._kinds[index] is None else None
        counted = self._counted(stage)
        once = None if stage.after_step is None else stage.after_step.kind
        sizes = len(stage.params), len(stage.changing)
        return self._kinds[index], alone, shapes, borrowed, counted, once, stage.sums, sizes

    def update(
        self,
        params: Mapping[int, Arrays],
        states: Mapping[int, Any],
        gradients: Mapping[int, Arrays],
        before: Mapping[int, Arrays],
        after: Mapping[int, Arrays],
        sums: Mapping[int, Mapping[str, jax.Array]],
    ) -> tuple[dict[int, Arrays], dict[int, Any], dict[int, Arrays], Scalars]:
        """The new parameters, optimizer state and other state of every local stage, and the scalars of the update.

        Arguments:
            params: Parameters by local stage; donated.
            states: Optimizer state by local stage; donated.
            gradients: Gradients of the summed loss, by local stage.
            before: Other state at the start of the step. What forward does not change is handed on as it is.
            after: Other state at the end of the step.
            sums: What each local stage added up: the last one the sum of the losses and their weight, and every stage
                what its `StageParameters` names.
        """
        last = len(self._stages) - 1
        below: dict[int, tuple[Arrays, ...]] = dict.fromkeys(self._local, ())

        def added(i: int) -> Arrays:
            nothing = (self._nothing[i],) * (1 + len(self._sums))
            own = tuple([sums[i][name] for name in self._stages[i].sums])
            return self._norms[i](gradients[i], own, (*below[i], nothing, nothing)[:2])

        for i, move in self._up.items():
            arrived = move(added(i) if i in below else None)
            if arrived is not None:
                below[parent(i, len(self._stages))] += (arrived,)
        scalars: dict[int, Arrays | None] = {}
        if self._last_is_local:
            scalars[last] = self._summarise(added(last), (sums[last][LOSS], sums[last][WEIGHT]), self.good)
        for i, move in reversed(self._down.items()):
            above = scalars.get(parent(i, len(self._stages)))
            scalars[i] = move(above if above is None or jax.process_count() > 1 else above[:2])
        results = {}
        for i, leaves in params.items():
            scale, applied, *_ = scalars[i]  # type: ignore[misc]
            opt_state = jax.tree.leaves(states[i])
            old, new = (tuple([state[i][k] for k in self._changing[i]]) for state in (before, after))
            read = tuple([before[i][k] for k in self._read_after_step[i]])
            results[i] = self._updates[i](leaves, opt_state, gradients[i], old, new, scale, applied, read)
        summed = scalars[last if self._last_is_local else self._local[0]]
        assert summed is not None
        _, applied, loss, norm, self.good, *found = summed
        means = dict(zip(self._means, found, strict=True))
        terms, metrics = (
            {name_of_mean(name): mean for name, mean in means.items() if is_term(name) is wanted}
            for wanted in (True, False)
        )
        new_params, leaves_of = ({i: r[k] for i, r in results.items()} for k in range(2))
        new_state = {i: replaced(before[i], self._changing[i], r[2]) for i, r in results.items()}
        new_states = {i: jax.tree.unflatten(jax.tree.structure(states[i]), new) for i, new in leaves_of.items()}
        self.finite = {i: r[3] for i, r in results.items()}
        return new_params, new_states, new_state, Scalars(loss, norm, self.good, applied, terms, metrics)

    def _counted(self, stage: StageParameters) -> tuple[bool, ...]:
        """Which gradients of a stage count in the global norm."""
        return tuple(path not in stage.borrowed and path not in self.unused for path in stage.params)

    def _add(self, stage: StageParameters) -> Callable[[Arrays, Arrays, tuple[Arrays, ...]], Arrays]:
        """Adds up the squares of a stage's gradients and its sums, and those from the stages below it in the tree."""
        squares = self._sum_of_squares(stage)

        def add(gradients: Arrays, own: Arrays, below: tuple[Arrays, ...]) -> Arrays:
            named = dict(zip(stage.sums, own, strict=True))
            start = squares(gradients, ()), *(named.get(name, jnp.zeros((), scalar_dtype())) for name in self._sums)
            return tuple(sum(values, start=first) for first, *values in zip(start, *below, strict=True))

        return add

    def _sum_of_squares(self, stage: StageParameters) -> Callable[[Arrays, Arrays], jax.Array]:
        counted = self._counted(stage)

        def sum_of_squares(gradients: Arrays, below: Arrays) -> jax.Array:
            squares = (_square(g) for g, c in zip(gradients, counted, strict=True) if c)
            return sum(below, start=sum(squares, start=jnp.zeros((), scalar_dtype())))

        return sum_of_squares

    def _summary(self, added: Arrays, totals: Arrays, good: jax.Array) -> Arrays:
        """Scale of the gradients, whether to update, mean loss, norm, whether both and all before were finite, and
        further means.
        """
        square, *rest = added
        total, weight = totals
        sums = {**dict(zip(self._sums, rest, strict=True)), WEIGHT: weight}
        counts = weight != 0
        divisor = jnp.where(counts, weight, 1)

        def mean(name: str) -> jax.Array:
            if is_term(name):
                return jnp.where(counts, sums[name] / divisor, sums[name] * 0)
            return sums[name] / sums[str(weight_of(name))]

        # 0 where nothing counts, and NaN where there was one.
        loss, norm = (jnp.where(counts, value / divisor, value * 0) for value in (total, jnp.sqrt(square)))
        clip = self._clip_norm
        factor = jnp.ones((), norm.dtype) if clip is None else jnp.where(norm > clip, clip / norm, 1.0)
        means = [mean(name) for name in self._means]
        for value in (loss, norm, *(m for name, m in zip(self._means, means, strict=True) if is_term(name))):
            good = good & jnp.isfinite(value)
        return factor / divisor, good & counts, loss, norm, good, *means

    def _update(self, stage: StageParameters) -> Callable[..., tuple[Arrays, Any, Arrays, jax.Array]]:
        def update(params, opt_state, gradients, before, after, scale, applied, read):  # type: ignore[no-untyped-def]
            named = dict(zip(stage.params, params, strict=True))
            owned = {path: named[path] for path in stage.owned}
            scaled = {
                path: (gradient * scale).astype(named[path].dtype)
                for path, gradient in zip(stage.params, gradients, strict=True)
                if path in owned
            }
            with call_of_optimizer():
                updates, new_state = self._transformation.update(scaled, opt_state, owned)
            new = {**named, **optax.apply_updates(owned, updates)}
            if stage.after_step is not None:
                state = dict(zip((*stage.changing, *stage.read_after_step), (*after, *read), strict=True))
                after = tuple({**state, **stage.after_step.run(new, state)}[path] for path in stage.changing)

            def keep(changed: Any, unchanged: Any) -> Any:
                return jax.tree.map(lambda a, b: jnp.where(applied, a, b), changed, unchanged)

            changed = keep(tuple(new[p] for p in stage.params), params)
            finite = jnp.all(jnp.stack([jnp.isfinite(leaf).all() for leaf in changed])) if changed else jnp.bool_(True)
            return changed, keep(new_state, opt_state), keep(after, before), finite

        return update


def parent(stage: int, num_stages: int) -> int:
    """The stage that receives this one's sum, and sends it the scalars of the update: its parent in a binary tree.

    The last stage is the root, and a parent comes after its children. So every stage communicates with at most three
    others, and waits for as many transfers as the tree is deep.
    """
    return num_stages - 1 - (num_stages - 2 - stage) // 2


def _square(gradient: jax.Array) -> jax.Array:
    """The sum of the squared absolute values of its elements, which may be complex."""
    parts = (gradient.real, gradient.imag) if jnp.iscomplexobj(gradient) else (gradient,)
    wide = scalar_dtype()
    return sum((jnp.sum(jnp.square(part.astype(wide))) for part in parts), start=jnp.zeros((), wide))


def _accumulators(stage: StageParameters) -> tuple[jax.ShapeDtypeStruct, ...]:
    return tuple(abstract(p.shape, jnp.promote_types(p.dtype, jnp.float32), p.sharding) for p in stage.params.values())
