"""The programs of an update, stage by stage: Optax, and the global norm. Compiled, with nothing allocated."""

from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import optax

from meshpipe.compiler.compiler import Compiler
from meshpipe.compiler.refusal import compiling_stage
from meshpipe.optimizer.parameters import StageParameters
from meshpipe.optimizer.separable import call_of_optimizer, kinds_and_frozen
from meshpipe.optimizer.state import state_shapes
from meshpipe.optimizer.sums import WEIGHT, further_sums, is_term, weight_of
from meshpipe.sharding import Arrays, abstract, is_local, replicated, scalar_dtype


class UpdatePrograms:
    """What an `Optimizer` runs, in the stages on devices of this process.

    Raises `ValueError` for a transformation that mixes gradients of different stages.
    """

    def __init__(
        self,
        transformation: optax.GradientTransformation,
        stages: Sequence[StageParameters],
        clip_norm: float | None = None,
    ):
        self.kinds, unused = kinds_and_frozen(transformation, [stage.owned for stage in stages])
        self.unused = unused
        """The paths of parameters whose gradients no update uses, now or later."""
        self.transformation, self._stages, self._clip_norm = transformation, stages, clip_norm
        self.sums = further_sums(name for stage in stages for name in stage.sums)
        """What all stages add up, beside squares, loss and weight."""
        self.means = tuple(name for name in self.sums if weight_of(name) is not None)
        """The sums of which means are reported."""
        self.state_shapes = [state_shapes(transformation, stage) for stage in stages]
        self.local = [i for i, stage in enumerate(stages) if is_local(stage.mesh)]
        self._last = replicated(stages[-1].mesh)
        self.inits: dict[int, Any] = {}
        """Parameters -> Optax's state, by local stage."""
        self.norms: dict[int, Any] = {}
        """Gradients, own sums, those of two stages below -> their sums."""
        self.updates: dict[int, Any] = {}
        """Parameters and Optax's state (donated), gradients, state before and after, scale, whether to update, what a
        function after the step reads -> parameters, Optax's state, state, whether they are finite."""
        self.summary: Any = None
        """Sums of all stages -> scalars of the update; where the last stage is local."""

    def compile(self, compiler: Compiler | None = None, *, inits: bool = True) -> None:
        """Compiles what an update runs, in threads, and with `inits` what makes the first state of Optax.

        Programs see leaves without their paths, so stages of equal shapes that are updated alike share them: the first
        stage is traced and compiled, the others get copies.
        """
        programs = compiler or Compiler()
        firsts: dict[Hashable, int] = {}
        for index in self.local:
            firsts.setdefault(self._kind(index), index)

        def copy_stage(index: int) -> None:
            first = firsts[self._kind(index)]
            for found in (self.norms, self.updates, *([self.inits] if inits else [])):
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
                changed, new_opt_state, *others = update_tree(params, jax.tree.unflatten(treedef, leaves), *arguments)
                return changed, jax.tree.leaves(new_opt_state), *others

            gradients = _accumulators(stage)
            everywhere = replicated(stage.mesh)
            scalar = abstract((), scalar_dtype(), everywhere)
            applied = abstract((), jnp.bool_, everywhere)
            params, state = tuple(stage.params.values()), tuple(stage.changing.values())
            shardings = jax.tree.map(lambda s: s.sharding, (params, opt_state, state, applied))
            summed = jax.jit(self._add(stage), out_shardings=everywhere)
            own, below = (scalar,) * len(stage.sums), (scalar,) * (1 + len(self.sums))
            jitted = jax.jit(update, donate_argnums=(0, 1), out_shardings=shardings)
            read = tuple(stage.read_after_step.values())
            arguments = (params, opt_state, gradients, state, state, scalar, applied, read)
            with compiling_stage(index):
                self.norms[index] = programs.compile(summed.lower(gradients, own, (below, below)), stage.mesh)
                self.updates[index] = programs.compile(jitted.lower(*arguments), stage.mesh)
                if inits:
                    self.inits[index] = self.compile_init(index, programs)

        def compile_summary() -> None:
            scalar, good = abstract((), scalar_dtype(), self._last), abstract((), jnp.bool_, self._last)
            summary = jax.jit(self._summary, out_shardings=self._last)
            lowered = summary.lower((scalar,) * (1 + len(self.sums)), (scalar, scalar), good)
            self.summary = programs.compile(lowered, self._stages[-1].mesh)

        with ThreadPoolExecutor() as pool:
            originals = [pool.submit(compile_stage, index) for index in firsts.values()]
            if len(self._stages) - 1 in self.local:
                originals.append(pool.submit(compile_summary))
            for original in originals:
                original.result()
            list(pool.map(copy_stage, [index for index in self.local if index not in firsts.values()]))

    def _kind(self, index: int) -> Hashable:
        """A key that is equal for stages that can share a program."""
        stage = self._stages[index]
        leaves = [*stage.params.values(), *stage.changing.values(), *jax.tree.leaves(self.state_shapes[index])]
        shapes = tuple((leaf.shape, leaf.dtype, leaf.sharding.spec) for leaf in leaves)
        borrowed = tuple(path in stage.borrowed for path in stage.params)
        alone = index if self.kinds[index] is None else None
        counted = self._counted(stage)
        once = None if stage.after_step is None else stage.after_step.kind
        sizes = len(stage.params), len(stage.changing)
        return self.kinds[index], alone, shapes, borrowed, counted, once, stage.sums, sizes

    def compile_init(self, index: int, compiler: Compiler) -> Any:
        stage, shapes = self._stages[index], self.state_shapes[index]

        def init(params: Arrays) -> list[jax.Array]:
            named = dict(zip(stage.params, params, strict=True))
            return jax.tree.leaves(self.transformation.init({path: named[path] for path in stage.owned}))

        shardings = [shape.sharding for shape in jax.tree.leaves(shapes)]
        return compiler.compile(jax.jit(init, out_shardings=shardings).lower(tuple(stage.params.values())), stage.mesh)

    def _counted(self, stage: StageParameters) -> tuple[bool, ...]:
        """Which gradients of a stage count in the global norm."""
        return tuple(path not in stage.borrowed and path not in self.unused for path in stage.params)

    def _add(self, stage: StageParameters) -> Callable[[Arrays, Arrays, tuple[Arrays, ...]], Arrays]:
        """Adds up the squares of a stage's gradients and its sums, and those from the stages below it in the tree."""
        squares = self._sum_of_squares(stage)

        def add(gradients: Arrays, own: Arrays, below: tuple[Arrays, ...]) -> Arrays:
            named = dict(zip(stage.sums, own, strict=True))
            start = squares(gradients, ()), *(named.get(name, jnp.zeros((), scalar_dtype())) for name in self.sums)
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
        sums = {**dict(zip(self.sums, rest, strict=True)), WEIGHT: weight}
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
        means = [mean(name) for name in self.means]
        for value in (loss, norm, *(m for name, m in zip(self.means, means, strict=True) if is_term(name))):
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
                updates, new_opt_state = self.transformation.update(scaled, opt_state, owned)
            new = {**named, **optax.apply_updates(owned, updates)}
            if stage.after_step is not None:
                state = dict(zip((*stage.changing, *stage.read_after_step), (*after, *read), strict=True))
                after = tuple({**state, **stage.after_step.run(new, state)}[path] for path in stage.changing)

            def keep(changed: Any, unchanged: Any) -> Any:
                return jax.tree.map(lambda a, b: jnp.where(applied, a, b), changed, unchanged)

            changed = keep(tuple(new[p] for p in stage.params), params)
            finite = jnp.all(jnp.stack([jnp.isfinite(leaf).all() for leaf in changed])) if changed else jnp.bool_(True)
            return changed, keep(new_opt_state, opt_state), keep(after, before), finite

        return update


def _square(gradient: jax.Array) -> jax.Array:
    """The sum of the squared absolute values of its elements, which may be complex."""
    parts = (gradient.real, gradient.imag) if jnp.iscomplexobj(gradient) else (gradient,)
    wide = scalar_dtype()
    return sum((jnp.sum(jnp.square(part.astype(wide))) for part in parts), start=jnp.zeros((), wide))


def _accumulators(stage: StageParameters) -> tuple[jax.ShapeDtypeStruct, ...]:
    return tuple(abstract(p.shape, jnp.promote_types(p.dtype, jnp.float32), p.sharding) for p in stage.params.values())
