"""Training state on a mesh, one step of it, and evaluation."""

import json
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from meshpipe.choose.chooser import Chooser, check_costs
from meshpipe.compiler.cache import open_cache
from meshpipe.compiler.compiler import Compiler
from meshpipe.environment import check_settings
from meshpipe.errors import ArgumentError, check_clip_norm, check_seed
from meshpipe.layers.description import describe_model, describe_programs
from meshpipe.layers.initialise import initialise
from meshpipe.layers.layer import LayerLike, Leaves
from meshpipe.layers.microbatches import OwnBatch
from meshpipe.layers.paths import by_path
from meshpipe.layers.stage_function import Loss, Metrics
from meshpipe.layers.staged_model import StagedModel, StageInfo
from meshpipe.layers.task import Task
from meshpipe.mesh import make_mesh
from meshpipe.observe.clock import MeasuredStep, measure_step
from meshpipe.observe.diagnose import first_non_finite
from meshpipe.optimizer.optimizer import Optimizer
from meshpipe.optimizer.tied import TiedLeaves
from meshpipe.pipeline.config import PipelineConfig
from meshpipe.pipeline.executor import Observer
from meshpipe.plan.plan import Plan
from meshpipe.plan.rendezvous import check_program
from meshpipe.processes.agreement import agree, report_failure
from meshpipe.processes.group import Group
from meshpipe.processes.uneven_exit import watch, watch_keys
from meshpipe.sharding import ShardingRules, local_value, scalar_dtype
from meshpipe.stage.target import Target

STEPS_AHEAD = 32
"""Steps that may be dispatched before the first of them is done."""
LAST_STAGE_SECONDS = 3600.0
"""How long to wait for what the last stage found out."""

Batch = Mapping[str, Any]
StateTree = dict[str, dict[str, Any]]
"""What a stage owns, by leaf path: `{"params": ..., "state": ..., "optimizer": ...}`."""


class NonFiniteError(FloatingPointError):
    """The loss, a gradient or a parameter is not finite."""

    def __init__(self, message: str, step: int, *, left_out: bool) -> None:
        super().__init__(message)
        self.step = step
        """The first step that is not finite."""
        self.left_out = left_out
        """Whether the update was left out, so that the trainer is as it was before `step` and can go on."""


@dataclass(frozen=True)
class StepResult:
    """One update's scalars, still on their devices; `float()` waits for them."""

    step: int
    """Number of the update, from 1."""
    loss: jax.Array
    """Mean loss over the whole batch, whose gradient made the update."""
    grad_norm: jax.Array
    """Global norm of the gradient before clipping."""
    good: jax.Array
    """False when the loss or the norm is not finite, and the update was therefore left out."""
    applied: jax.Array
    """False when the update was left out: it was not finite, or the weight of the whole batch is 0."""
    finite: dict[int, jax.Array]
    """For each local stage, whether its parameters are finite after the update."""
    measured: MeasuredStep | None = None
    """When each action ran, where that was asked for."""


class Trainer:
    """Layers, a loss and an Optax transformation on a mesh: `step` updates, `evaluate` does not.

    `batch` is an example of a global batch, arrays or shapes; `loss(output, microbatch)` returns the sum of the losses
    and their weight. `input` names the batch field that the first layer is called with. Everything is compiled here,
    all stages at once, after the layers were measured if `pipeline` asks for that, or loaded from the folder
    `compile_cache`, where programs are kept for later runs. `target` is what the programs are written for, in place of
    the platform of the mesh.

    Every process with devices of the mesh makes the trainer with the same arguments, and their trainers in the same
    order; they compare what each would run before anything moves between them.

    Raises `ValueError` when layers, batch, mesh, schedule and optimizer do not fit together, when another process would
    run something else (in all of them, naming what differs), or when the folder cannot be made.
    """

    def __init__(
        self,
        layers: Sequence[LayerLike],
        loss: Loss,
        optimizer: optax.GradientTransformation,
        *,
        batch: Batch,
        mesh: Mesh | None = None,
        input: str = "inputs",
        pipeline: PipelineConfig | None = None,
        seed: int = 0,
        clip_norm: float | None = None,
        metrics: Metrics | None = None,
        tied: Sequence[Sequence[str]] = (),
        rules: ShardingRules | None = None,
        compile_cache: str | None = None,
        target: Target | None = None,
    ):
        rules = ShardingRules() if rules is None else rules
        task = Task(layers, loss, batch=batch, input=input, metrics=metrics, tied=tied, rules=rules)
        self._begin(task, optimizer, mesh, pipeline, seed, clip_norm, compile_cache, target)

    @classmethod
    def of(
        cls,
        task: Task,
        optimizer: optax.GradientTransformation,
        *,
        mesh: Mesh | None = None,
        pipeline: PipelineConfig | None = None,
        seed: int = 0,
        clip_norm: float | None = None,
        compile_cache: str | None = None,
        target: Target | None = None,
        check: Callable[[StagedModel], None] | None = None,
    ) -> "Trainer":
        """As the constructor, with a task for the first arguments; `check` sees the model before it is compiled."""
        trainer = cls.__new__(cls)
        trainer._begin(task, optimizer, mesh, pipeline, seed, clip_norm, compile_cache, target, check)
        return trainer

    def _begin(
        self,
        task: Task,
        optimizer: optax.GradientTransformation,
        mesh: Mesh | None,
        pipeline: PipelineConfig | None,
        seed: int,
        clip_norm: float | None,
        compile_cache: str | None,
        target: Target | None,
        check: Callable[[StagedModel], None] | None = None,
    ) -> None:
        check_settings()
        check_seed(seed)
        check_clip_norm(clip_norm)
        mesh = make_mesh() if mesh is None else mesh
        pipeline = PipelineConfig() if pipeline is None else pipeline
        chooser = Chooser(task, optimizer, mesh=mesh, config=pipeline, target=target)
        self._set_up(chooser, seed, clip_norm, compile_cache, check)

    def _set_up(
        self,
        chooser: Chooser,
        seed: int,
        clip_norm: float | None,
        compile_cache: str | None,
        check: Callable[[StagedModel], None] | None,
    ) -> None:
        self.seed = seed
        self.step_number = 0
        self._unchecked: deque[tuple[int, jax.Array, OwnBatch]] = deque()
        self.group = Group(device.process_index for device in chooser.mesh.devices.flat)
        """The processes that have a part in it."""
        if not self.group.is_alone:
            watch_keys()
        with report_failure(self.group, "model"):
            if not self.group.is_alone:
                check_costs(chooser.config)
            self.model = chooser.choose()
            if check is not None:
                check(self.model)
            check_program(self.model.program)
        if not self.group.is_alone:
            agree(self.group, "model", describe_model(self.model) | {"seed": str(seed), "clip norm": str(clip_norm)})
        started = time.perf_counter()
        with report_failure(self.group, "programs"):
            made = self._compile(chooser.transformation, clip_norm, compile_cache)
        if not self.group.is_alone:  # until here nothing has moved
            agree(self.group, "programs", describe_programs(self.model) | self.optimizer.description())
        watch(self.group)
        self._place(made)
        self.compile_seconds = time.perf_counter() - started

    def _compile(
        self, transformation: optax.GradientTransformation, clip_norm: float | None, compile_cache: str | None
    ) -> list[tuple[Leaves, Leaves]]:
        """Everything that a step runs, and parameters and state of the local layers, which are made meanwhile."""
        model, name = self.model, self.group.name
        self.tied = TiedLeaves(model.tied, model.parameters, f"{name}/tied")
        compiler = Compiler(open_cache(compile_cache))
        made: list[tuple[Leaves, Leaves]] = []

        def make_optimizer() -> None:
            self.optimizer = Optimizer(transformation, model.parameters, clip_norm, name)
            self.optimizer.compile(compiler)

        def make_parameters() -> None:
            made.extend(initialise(model.layers_on_submeshes, model.rules, self.seed, compiler))

        model.compile([make_optimizer, make_parameters], compiler, name)
        model.release()
        return made

    def _place(self, made: Sequence[tuple[Leaves, Leaves]]) -> None:
        model = self.model
        self._seed_data = model.place_seed(self.seed)
        params = {path: leaf for layer, _ in made for path, leaf in layer.items()}
        state = {path: leaf for _, layer in made for path, leaf in layer.items()}
        stages = {s: model.parameters[s] for s in model.local}
        self._params = self.tied.share_values({s: tuple(params[p] for p in of.params) for s, of in stages.items()})
        self._state = {s: tuple(state[p] for p in of.state) for s, of in stages.items()}
        self._opt_states = self.optimizer.init(self._params)
        self._optimizer_paths = [
            tuple(by_path(shapes, stage.params))
            for stage, shapes in zip(model.parameters, self.optimizer.state_shapes, strict=True)
        ]

    @property
    def mesh(self) -> Mesh:
        return self.model.mesh

    @property
    def plan(self) -> Plan:
        return self.model.plan

    @property
    def stages(self) -> tuple[StageInfo, ...]:
        return self.model.stages

    @property
    def notes(self) -> tuple[str, ...]:
        """What the model does because of how its layers are written, in sentences that the command line prints too.

        They tell which parameters are tied because layers share a variable, which batch fields reach optional
        keywords, and which modules stay in evaluation mode.
        """
        return self.model.notes

    def step(self, batch: Batch, *, measure: bool = False, observe: Observer | None = None) -> StepResult:
        """One update on a global batch; returns as soon as the batch is copied and the work is dispatched.

        With `measure` it waits for the steps before and for its own gradients, and the result has the times of all its
        actions. `observe` is called after each action is dispatched, unless it is measured. Raises `ValueError` when
        the batch's fields, shapes or dtypes are not those of the example.
        """
        batch = self.model.microbatches.read(batch)
        gradients, after, totals, measured = self._accumulate(batch, measure=measure, observe=observe)
        gradients = self.tied.sum_gradients(gradients)
        self._params, self._opt_states, self._state, found = self.optimizer.update(
            self._params, self._opt_states, gradients, self._state, after, totals
        )
        self._params = self.tied.share_values(self._params)
        self.step_number += 1
        result = StepResult(self.step_number, *found, self.optimizer.finite, measured)
        self._remember(result.step, result.good, batch)
        return result

    def loss_and_gradients(self, batch: Batch) -> tuple[jax.Array, Leaves]:
        """The loss of a batch and the gradient of every parameter, by leaf path, without an update.

        A tied parameter's gradient stands under its owner's path. Of several processes, each has the gradients of its
        own stages. Where the weight of the whole batch is 0, there is no mean, and the sums are returned.
        """
        gradients, _, totals, _ = self._accumulate(batch)
        gradients = self.tied.sum_gradients(gradients)
        total, weight = self._from_last_stage([local_value(value) for value in totals[:2]])
        divisor = scalar_dtype().type(weight or 1)
        stages = self.model.parameters
        return jnp.asarray(total / divisor, scalar_dtype()), {
            path: (leaf / divisor).astype(leaf.dtype)
            for s, leaves in gradients.items()
            for path, leaf in zip(stages[s].params, leaves, strict=True)
            if path not in stages[s].borrowed
        }

    def evaluate(self, batches: Iterable[Batch]) -> dict[str, float]:
        """Means over all batches of the loss and the metrics, with layers in evaluation mode; nothing is updated.

        What has a weight of 0 over all batches is NaN. Raises `ValueError` when there is no batch, or `batches` is one.
        """
        if isinstance(batches, Mapping):
            raise ArgumentError("`evaluate` takes batches, one after the other. Got one. Write evaluate([batch]).")
        executor, names = self.model.evaluation
        sums: list[np.ndarray] = []
        for batch in batches:
            inputs = self.model.evaluation_inputs(batch, self._seed_data)
            self.group.calls += 1
            _, _, totals = executor.run(self._params, self._state, inputs)
            sums.append(np.asarray([local_value(value) for value in totals], np.float64))
        if not sums:
            raise ValueError("Evaluation needs at least one batch. Got none; lower the batch size or add data.")
        total = np.sum(sums, axis=0)
        sums_and_weights = zip(names, total[::2].tolist(), total[1::2].tolist(), strict=bool(len(total)))
        means = {name: value / weight if weight else math.nan for name, value, weight in sums_and_weights}
        return self._from_last_stage(means)

    def _from_last_stage(self, value: Any) -> Any:
        """What the processes of the last stage have, in all processes; anything that JSON can hold.

        The last stage has a value only after all have handed over the work that it comes from.
        """
        if self.group.is_alone:
            return value
        last = self.model.stages[-1].submesh.devices.flat[0].process_index
        text = json.dumps(jax.tree.map(float, value)) if jax.process_index() == last else None
        return json.loads(self.group.broadcast("last stage", text, last, LAST_STAGE_SECONDS))

    def check(self, result: StepResult) -> None:
        """Waits for the step. Raises `NonFiniteError`, which names step, stage, microbatch and layer.

        Of several bad steps the first is named, so it does to check some. Where its update was left out, so were those
        of all steps after it: the trainer is then as it was after the last good step, and can go on.
        """
        if local_value(result.good):
            spoiled = [stage for stage, finite in result.finite.items() if not local_value(finite)]
            if spoiled:
                raise NonFiniteError(
                    f"Step {result.step} has a finite loss and gradient, but its update made parameters of stage "
                    f"{spoiled[0]} not finite. Lower the learning rate, and restore the last checkpoint.",
                    result.step,
                    left_out=False,
                )
            return
        first = next(((step, batch) for step, good, batch in self._unchecked if not local_value(good)), None)
        if first is None:
            message = f"Step {result.step} was left out, because a step before it was not finite."
            raise NonFiniteError(message, result.step, left_out=True)
        step, batch = first
        self.step_number = step - 1
        self._unchecked.clear()
        self.optimizer.reset()
        if jax.process_count() > 1:
            origin = "run it in one process to find out where that began."
        else:
            origin = first_non_finite(self.model, self.params, self.state, self.seed, step - 1, batch)
        raise NonFiniteError(f"Step {step} is not finite: {origin}", step, left_out=True)

    def _remember(self, step: int, good: jax.Array, batch: OwnBatch) -> None:
        """Keeps steps until they are known to be good, so that the first bad one can be run again.

        It does not wait, unless `STEPS_AHEAD` steps are not done: each keeps a batch in memory.
        """
        if len(self._unchecked) >= STEPS_AHEAD:
            jax.block_until_ready(self._unchecked[0][1])
        while self._oldest_is_known() and local_value(self._unchecked[0][1]):
            self._unchecked.popleft()
        if not self._oldest_is_known():  # else it is bad, and none after it counts
            self._unchecked.append((step, good, batch))

    def _oldest_is_known(self) -> bool:
        return bool(self._unchecked) and self._unchecked[0][1].is_ready()  # type: ignore[attr-defined]

    @property
    def params(self) -> Leaves:
        """Every parameter by leaf path, on its submesh; `step` donates these arrays."""
        return {k: v for tree in self.state_tree() for k, v in tree["params"].items()}

    @property
    def state(self) -> Leaves:
        """Batch statistics and other state by leaf path, on its submesh."""
        return {k: v for tree in self.state_tree() for k, v in tree["state"].items()}

    def state_tree(self) -> list[StateTree]:
        """Everything that training changes, one tree a stage, for a checkpoint; `step` donates these arrays.

        The trees of stages that live in other processes are empty.
        """
        return [
            {
                "params": dict(zip(stage.params, self._params[i], strict=True)),
                "state": dict(zip(stage.state, self._state[i], strict=True)),
                "optimizer": self._named(i, self._opt_states[i]),
            }
            if i in self._params
            else {"params": {}, "state": {}, "optimizer": {}}
            for i, stage in enumerate(self.model.parameters)
        ]

    def abstract_state_tree(self, *, optimizer: bool = True) -> list[StateTree]:
        """The shapes and shardings of `state_tree`, to restore into; without `optimizer`, of the weights alone."""
        return [
            {"params": dict(stage.params), "state": dict(stage.state)}
            | ({"optimizer": self._named(i, self.optimizer.state_shapes[i])} if optimizer else {})
            for i, stage in enumerate(self.model.parameters)
        ]

    def load_state_tree(self, trees: Sequence[StateTree], step: int, *, donate: bool = False) -> None:
        """Continues from restored trees as they were after update `step`; with trees of weights alone, the optimizer
        begins anew.

        The arrays are copied, unless they are donated: then they belong to the trainer, whose next step deletes them.
        """
        for i in self.model.local:
            tree, stage, shapes = trees[i], self.model.parameters[i], self.optimizer.state_shapes[i]
            wanted = dict(zip(self._optimizer_paths[i], jax.tree.leaves(shapes), strict=True))
            take = _as_they_are if donate else _copies
            self._params[i] = take(tree["params"], stage.params)
            self._state[i] = take(tree["state"], stage.state)
            if "optimizer" in tree:
                self._opt_states[i] = jax.tree.unflatten(jax.tree.structure(shapes), take(tree["optimizer"], wanted))
        # What was saved before two leaves were tied may have come apart.
        self._params = self.tied.share_values(self._params)
        if not any("optimizer" in trees[i] for i in self.model.local):
            self._opt_states = self.optimizer.init(self._params)
        jax.block_until_ready((self._params, self._state, self._opt_states))
        self.step_number = step
        self._unchecked.clear()
        self.optimizer.reset()

    def _named(self, stage: int, opt_state: Any) -> dict[str, Any]:
        """The leaves of a stage's optimizer state by path."""
        return dict(zip(self._optimizer_paths[stage], jax.tree.leaves(opt_state), strict=True))

    def _accumulate(
        self, batch: Batch, *, measure: bool = False, observe: Observer | None = None
    ) -> tuple[dict[int, Any], dict[int, Any], Any, MeasuredStep | None]:
        inputs = self.model.inputs(batch, self._seed_data, self.step_number)
        self.group.calls += 1
        if measure:
            return measure_step(self.model.executor, self._params, self._state, inputs)
        return *self.model.executor.run(self._params, self._state, inputs, observe), None


def _as_they_are(leaves: Mapping[str, Any], wanted: Mapping[str, jax.ShapeDtypeStruct]) -> tuple[jax.Array, ...]:
    return tuple(leaves[path] for path in wanted)


def _copies(leaves: Mapping[str, Any], wanted: Mapping[str, jax.ShapeDtypeStruct]) -> tuple[jax.Array, ...]:
    return tuple(jnp.copy(jax.device_put(leaves[path], shape.sharding)) for path, shape in wanted.items())
