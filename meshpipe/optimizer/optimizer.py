"""Optax on every stage, and what crosses stages: the global norm, and clipping by it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from meshpipe.compiler.compiler import Compiler
from meshpipe.compiler.digest import digest
from meshpipe.optimizer.parameters import StageParameters
from meshpipe.optimizer.separable import describe_updates
from meshpipe.optimizer.sums import LOSS, WEIGHT, is_term, name_of_mean
from meshpipe.optimizer.updates import UpdatePrograms
from meshpipe.pipeline.transfer import transfer_between
from meshpipe.processes.agreement import HASH
from meshpipe.sharding import Arrays, abstract, place, replicated, scalar_dtype
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
        self._programs = UpdatePrograms(transformation, stages, clip_norm)
        self.state_shapes, self.unused = self._programs.state_shapes, self._programs.unused
        self._local, self._stages = self._programs.local, stages
        self._last = replicated(stages[-1].mesh)
        self._everywhere = [replicated(stage.mesh) for stage in stages]
        self._changing = {
            i: [k for k, path in enumerate(stages[i].state) if path not in stages[i].fixed] for i in self._local
        }
        self._read_after_step = {
            i: [k for k, path in enumerate(stages[i].state) if path in stages[i].read_after_step] for i in self._local
        }
        self._last_is_local = len(stages) - 1 in self._local
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
                scalars = (scalar, flag, scalar, scalar, flag, *[scalar] * len(self._programs.means))
                square = abstract((), scalar_dtype(), self._everywhere[above])
                mesh = self._stages[above].mesh
                up[i] = transfer_between(f"{name}/norm {i}", stage.mesh, (square,) * (1 + len(self._programs.sums)))
                down[i] = transfer_between(
                    f"{name}/scale {i}", mesh, scalars if jax.process_count() > 1 else scalars[:2]
                )
        return up, down

    def description(self) -> dict[str, str]:
        """What must be the same in every process: by name, in words or as a hash."""
        found = describe_updates(
            self._programs.transformation, [stage.owned for stage in self._stages], self._programs.kinds
        )
        for s, shapes in enumerate(self.state_shapes):
            leaves, treedef = jax.tree.flatten(shapes)
            kept = [str(treedef), [(str(leaf.dtype), leaf.shape, leaf.sharding.spec) for leaf in leaves]]
            found[f"optimizer state of stage {s}"] = HASH + digest(kept)
        return found

    def init(self, params: Mapping[int, Arrays]) -> dict[int, Any]:
        """Optax's state of every local stage, made on its submesh."""
        compiler = Compiler()
        opt_states = {}
        for index, leaves in params.items():
            program = self._programs.inits.get(index) or self._programs.compile_init(index, compiler)
            opt_states[index] = jax.tree.unflatten(jax.tree.structure(self.state_shapes[index]), program(leaves))
        return opt_states

    def reset(self) -> None:
        """Lets updates happen again after a step that was not finite."""
        where = self._last if self._last_is_local else self._everywhere[self._local[0]]
        self.good: jax.Array = place(np.bool_(True), where)

    def compile(self, compiler: Compiler | None = None) -> None:
        """Compiles what `init` and `update` run, in threads."""
        self._programs.compile(compiler)

    def update(
        self,
        params: Mapping[int, Arrays],
        opt_states: Mapping[int, Any],
        gradients: Mapping[int, Arrays],
        before: Mapping[int, Arrays],
        after: Mapping[int, Arrays],
        sums: Mapping[int, Mapping[str, jax.Array]],
    ) -> tuple[dict[int, Arrays], dict[int, Any], dict[int, Arrays], Scalars]:
        """The new parameters, optimizer state and other state of every local stage, and the scalars of the update.

        Arguments:
            params: Parameters by local stage; donated.
            opt_states: Optimizer state by local stage; donated.
            gradients: Gradients of the summed loss, by local stage.
            before: Other state at the start of the step. What forward does not change is handed on as it is.
            after: Other state at the end of the step.
            sums: What each local stage added up: the last one the sum of the losses and their weight, and every stage
                what its `StageParameters` names.
        """
        last = len(self._stages) - 1
        below: dict[int, tuple[Arrays, ...]] = dict.fromkeys(self._local, ())

        def added(i: int) -> Arrays:
            nothing = (self._nothing[i],) * (1 + len(self._programs.sums))
            own = tuple([sums[i][name] for name in self._stages[i].sums])
            return self._programs.norms[i](gradients[i], own, (*below[i], nothing, nothing)[:2])

        for i, move in self._up.items():
            arrived = move(added(i) if i in below else None)
            if arrived is not None:
                below[parent(i, len(self._stages))] += (arrived,)
        scalars: dict[int, Arrays | None] = {}
        if self._last_is_local:
            scalars[last] = self._programs.summary(added(last), (sums[last][LOSS], sums[last][WEIGHT]), self.good)
        for i, move in reversed(self._down.items()):
            above = scalars.get(parent(i, len(self._stages)))
            scalars[i] = move(above if above is None or jax.process_count() > 1 else above[:2])
        results = {}
        for i, leaves in params.items():
            scale, applied, *_ = scalars[i]  # type: ignore[misc]
            opt_state = jax.tree.leaves(opt_states[i])
            old, new = (tuple([state[i][k] for k in self._changing[i]]) for state in (before, after))
            read = tuple([before[i][k] for k in self._read_after_step[i]])
            results[i] = self._programs.updates[i](leaves, opt_state, gradients[i], old, new, scale, applied, read)
        summed = scalars[last if self._last_is_local else self._local[0]]
        assert summed is not None
        _, applied, loss, norm, self.good, *found = summed
        means = dict(zip(self._programs.means, found, strict=True))
        terms, metrics = (
            {name_of_mean(name): mean for name, mean in means.items() if is_term(name) is wanted}
            for wanted in (True, False)
        )
        new_params, leaves_of = ({i: r[k] for i, r in results.items()} for k in range(2))
        new_state = {i: replaced(before[i], self._changing[i], r[2]) for i, r in results.items()}
        new_opt_states = {i: jax.tree.unflatten(jax.tree.structure(opt_states[i]), new) for i, new in leaves_of.items()}
        self.finite = {i: r[3] for i, r in results.items()}
        return new_params, new_opt_states, new_state, Scalars(loss, norm, self.good, applied, terms, metrics)


def parent(stage: int, num_stages: int) -> int:
    """The stage that receives this one's sum, and sends it the scalars of the update: its parent in a binary tree.

    The last stage is the root, and a parent comes after its children. So every stage communicates with at most three
    others, and waits for as many transfers as the tree is deep.
    """
    return num_stages - 1 - (num_stages - 2 - stage) // 2
