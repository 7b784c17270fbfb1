"""A trainer: layers, a loss and an optimizer on a mesh; one step of it, and evaluation."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, overload

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from meshpipe.adapters.merge import merge_lora
from meshpipe.html import html_table
from meshpipe.layers.layer import LayerLike, Leaves
from meshpipe.layers.modules import host_device, local_leaves, modules_with, shared_groups_of, write, write_merged
from meshpipe.layers.stage_function import Loss, Metrics
from meshpipe.layers.stage_leaves import StageInfo
from meshpipe.layers.task import Task
from meshpipe.layers.trainable import Trainable, describe_unused
from meshpipe.observe.clock import MeasuredStep, measure_step
from meshpipe.observe.diagnose import first_non_finite
from meshpipe.optimizer.sums import LOSS, WEIGHT
from meshpipe.pipeline.config import PipelineConfig
from meshpipe.pipeline.executor import Observer
from meshpipe.plan.plan import Plan
from meshpipe.sharding import ShardingRules, local_value, scalar_dtype
from meshpipe.stage.target import Target
from meshpipe.training.base import digest_of_leaves
from meshpipe.training.evaluation import evaluate, from_last_stage
from meshpipe.training.prediction import Predictor
from meshpipe.training.result import NonFiniteError, StepResult
from meshpipe.training.setup import Check, Setup, set_up
from meshpipe.training.state import StateTree
from meshpipe.training.unchecked import UncheckedSteps

Batch = Mapping[str, Any]


class Trainer:
    """Layers, a loss and an Optax transformation on a mesh: `step` updates, `evaluate` does not.

    Every process that owns devices of the mesh must create the same trainers in the same order. The processes compare
    what each would run before anything moves between them.
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
        trainable: Trainable = None,
        rules: ShardingRules | None = None,
        compile_cache: str | None = None,
        target: Target | None = None,
        check_memory: bool = False,
    ):
        """Compiles all stages in parallel and initialises parameters and state on their devices. Runs no batch.

        **Arguments:**

        - `layers`: the layers, applied in order: `nnx.Module`s, constructors that take an `nnx.Rngs`
          (then no process ever holds the whole model), or functions of the activation such as `nnx.relu`.
        - `loss`: `loss(output, microbatch)` returns two scalars, the sum of the losses over a microbatch and their
          weight, for example how many there are. `output` is that of the last layer, `microbatch` a dict of the fields
          of `batch` with `[batch / num_microbatches, ...]` rows.
        - `optimizer`: an Optax transformation, which is given the gradient of the mean loss over the whole batch.
        - `batch`: an example of a global batch, a dict of arrays or `jax.ShapeDtypeStruct`s, every field
          `[batch, ...]`. Only shapes and dtypes count, unless layers are measured.
        - `mesh`: the devices, in a mesh whose first axis is `pipeline`; usually from `make_mesh`. By default, one stage
          on one device.
        - `input`: the field of `batch` that the first layer is called with. Layers ask for other fields by keyword.
        - `pipeline`: schedule, microbatches, rematerialisation and cut; by default `1f1b`, one microbatch, an even cut.
        - `seed`: of first values, dropout masks and other draws, 0 to 2**32 - 1; by default 0.
        - `clip_norm`: the global norm to which a larger gradient is scaled down; by default nothing is clipped.
          Parameters that the optimizer never moves do not count in it.
        - `metrics`: `metrics(output, microbatch)` returns further `(sum, weight)` pairs by name; `evaluate` has means.
        - `tied`: groups of leaf paths such as `("layers/0/embedding", "layers/5/kernel")` that share one parameter,
          owned by the first path. Layers that hold one `nnx.Variable` are tied without it; by default no others.
        - `trainable`: the parameters that are trained, as patterns of leaf paths (`"layers/3/*"`; one with `!` in front
          excludes), an NNX filter such as `nnx.LoRAParam`, or a list of both. The others are frozen: they keep their
          values, and have no gradient and no state of the optimizer. By default all are trained, or, in a model with
          `nnx.LoRAParam`, those alone; the first of `notes` says what is.
        - `rules`: which mesh axis each logical axis of a parameter is split over; by default `TENSOR_RULES`.
        - `compile_cache`: a folder that keeps compiled programs for later runs; by default none. Loading a program
          executes what its file says.
        - `target`: what the programs are written for; by default the platform of the mesh.
        - `check_memory`: whether to refuse what needs more memory, by prediction, than is free; by default not.

        **Raises** `ValueError` when layers, batch, mesh, schedule and optimizer do not fit together, processes disagree
        about what to run (each names the difference), the folder cannot be made, or the memory does not suffice.
        """
        rules = ShardingRules() if rules is None else rules
        task = Task(
            layers, loss, batch=batch, input=input, metrics=metrics, tied=tied, trainable=trainable, rules=rules
        )
        self._begin(set_up(task, optimizer, mesh, pipeline, seed, clip_norm, compile_cache, target, check_memory))

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
        check_memory: bool = False,
        check: Check | None = None,
        copies: int = 0,
    ) -> "Trainer":
        """Like the constructor, but takes a `Task`. `check` may reject the model before it is traced, or return a state
        to start from, which then belongs to the trainer; no first values are made for it. `copies` says how often all
        values are held once more, on the first device.
        """
        trainer = cls.__new__(cls)
        trainer._begin(
            set_up(task, optimizer, mesh, pipeline, seed, clip_norm, compile_cache, target, check_memory, check, copies)
        )
        return trainer

    def _begin(self, made: Setup) -> None:
        self.seed = made.seed
        self.step_number = made.step
        """Number of the last update; 0 before the first."""
        self.group, self.model, self.optimizer, self.tied = made.group, made.model, made.optimizer, made.tied
        self.compile_seconds = made.compile_seconds
        self._training, self._seed_data = made.training, made.seed_data
        self._unchecked = UncheckedSteps()
        self._predictor = Predictor(self.model, self._training, self._seed_data, self.group)

    def __repr__(self) -> str:
        axes = " x ".join(f"{name} {size}" for name, size in self.mesh.shape.items())
        return (
            f"Trainer({len(self.model.layers)} layers on {axes}, {self.plan.schedule}, stages={len(self.stages)}, "
            f"microbatches={self.plan.num_microbatches}, step={self.step_number})"
        )

    def _repr_html_(self) -> str:
        """A table of the stages for notebooks."""
        columns = ("stage", "rank", "layers", "devices", "parameters", "MB")
        rows = (
            (
                stage.index,
                stage.rank,
                f"{stage.layers.start} to {stage.layers.stop - 1}",
                ", ".join(str(device.id) for device in stage.submesh.devices.flat),
                f"{stage.parameter_count:,}",
                f"{stage.parameter_bytes / 1e6:.1f}",
            )
            for stage in self.stages
        )
        return html_table(repr(self), columns, rows)

    @property
    def mesh(self) -> Mesh:
        """The whole mesh; the stages of a rank are on the part of it at the rank's place along `pipeline`."""
        return self.model.mesh

    @property
    def plan(self) -> Plan:
        """The order of work in a step, and the graph of values that move between stages."""
        return self.model.plan

    @property
    def stages(self) -> tuple[StageInfo, ...]:
        """The layers and the submesh of every stage, in order, also of those in other processes."""
        return self.model.stages

    @property
    def notes(self) -> tuple[str, ...]:
        """What is trained, and what the model does because of how its layers are written, in sentences that the
        command line prints too: which parameters are tied because layers share a variable, which batch fields reach
        optional keywords, which modules stay in evaluation mode, and which gradients the optimizer never uses.
        """
        first, *others = self.model.notes
        return (first, *describe_unused(self.model.layers, self.optimizer.unused), *others)

    def step(self, batch: Batch, *, measure: bool = False, observe: Observer | None = None) -> StepResult:
        """One update on a global batch; returns as soon as the batch is copied and the work is dispatched.

        It waits only if the last 32 steps are all unfinished. With `measure` it waits for the steps before and for its
        own gradients, and the result has the times of all its actions; `observe` is then ignored. Otherwise `observe`
        is called after each action or transfer is dispatched. Raises `ValueError` when
        the batch's fields, shapes or dtypes are not those of the example.
        """
        batch = self.model.microbatches.read(batch)
        gradients, after, sums, measured = self._accumulate(batch, measure=measure, observe=observe)
        found = self._training.update(gradients, after, sums)
        self.step_number += 1
        scalars = found.loss, found.norm, found.good, found.applied
        finite = self.optimizer.finite
        result = StepResult(self.step_number, *scalars, finite, measured, found.terms, found.metrics)
        self._unchecked.add(result.step, result.good, batch)
        return result

    def loss_and_gradients(self, batch: Batch) -> tuple[jax.Array, Leaves]:
        """The loss of a batch and the gradient of every parameter that is trained, by leaf path, without an update.

        A tied parameter's gradient stands under its owner's path. Of several processes, each has the gradients of its
        own stages. Where the weight of the whole batch is 0, there is no mean, and the sums are returned.
        """
        gradients, _, sums, _ = self._accumulate(batch)
        gradients = self.tied.sum_gradients(gradients)
        of_last = sums.get(self.plan.num_stages - 1, {})
        found = from_last_stage(self.model, self.group, {name: local_value(value) for name, value in of_last.items()})
        total, weight = found[LOSS], found[WEIGHT]
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

        A batch may have any number of examples, and each counts once. The first time that the examples left over after
        full microbatches have a new number, the forwards are compiled for it. What has a weight of 0 over all batches
        is NaN. Raises `ValueError` when there is no batch, or `batches` is one.
        """
        return evaluate(self.model, self._training, batches, self._seed_data, self.group)

    @overload
    def predict(self, batches: Batch) -> Any: ...
    @overload
    def predict(self, batches: Iterable[Batch]) -> Iterator[Any]: ...
    def predict(self, batches: Batch | Iterable[Batch]) -> Any:
        """The outputs of the last layer, in evaluation mode: those of one batch, or an iterator over those of several.

        Outputs are NumPy arrays `[examples, ...]` in the pytree that the last layer returns, in the order of the batch;
        every process gets all of them. A batch needs only the fields that layers read, and may have any number of
        examples: a larger batch runs in several parts, and a smaller one is padded with copies of its last example,
        whose outputs are cut off.

        Each batch of an iterable runs when its outputs are asked for, with the parameters at that time; all processes
        must ask for the same batches. The first call compiles. Raises `ValueError` when a batch's fields differ from
        the example batch in more than the number of examples, or an output does not have one row per example.
        """
        if isinstance(batches, Mapping):
            return self._predictor.predict(batches)
        return map(self._predictor.predict, batches)

    def modules(self, *, device: jax.Device | None = None, train: bool = False, merged: bool = False) -> list[Any]:
        """A new NNX module for each layer with the trained values, in evaluation mode unless `train`.

        With `merged`, the adapters of `meshpipe.lora` are added to their kernels, as by `meshpipe.merge_lora`, and the
        modules are those of the base.

        Called one after the other, with the batch fields that they take, they compute what `predict` returns; where
        layers have named outputs, `meshpipe.assemble(layers, trainer.modules())` calls them so. The
        values are copies on one `device`, by default the host's CPU device. Tied and shared leaves are one variable.
        With several processes, all must call it; each gets the layers of its own stages, and None for the others.
        `meshpipe.load` returns all layers of a checkpoint.
        """
        device = host_device() if device is None else device
        values = local_leaves({**self.params, **self.state}, device)
        held = [i for s in self.model.local for i in self.model.cuts[s]]
        layers = [self.model.layers[i] for i in held]
        groups = (*self.model.tied, *shared_groups_of(layers))
        made = dict(
            zip(held, modules_with(layers, values, groups, seed=self.seed, device=device, train=train), strict=True)
        )
        if merged:
            made = dict(zip(made, merge_lora(list(made.values())), strict=True))
        return [made.get(i) for i in range(len(self.model.layers))]

    def update(self, layers: Sequence[LayerLike], *, merged: bool = False) -> None:
        """Writes the trained values into modules: those that the trainer was made from, or others with the same leaves.

        With `merged`, they are modules without adapters, such as those that `meshpipe.lora` was given; adapters are
        added to their kernels.

        Variables stay on their devices; random streams and modes do not change. The entry of a layer without leaves may
        be anything. With several processes, all must call it; each writes the layers of its own stages. Raises
        `ValueError`, before anything is written, when an entry is not a module, or its leaves are not those of its
        layer.
        """
        if merged:
            write_merged(self.model.layers, layers, self.modules(merged=True))
        else:
            write(self.model.layers, layers, local_leaves({**self.params, **self.state}, host_device()))

    def check(self, result: StepResult) -> None:
        """Waits for the step. Raises `NonFiniteError` if a number is not finite.

        The error names the step and, in a run of one process, the stage, microbatch and layer where it began. If
        several steps were bad, the first is reported, so checking every few steps is enough. If its update was left
        out, so were all later ones: the trainer is as it was after the last good step, and can go on.
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
        first = self._unchecked.first_bad()
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

    @property
    def params(self) -> Leaves:
        """Every parameter by leaf path, on its submesh; invalid after the next `step`, which donates the arrays."""
        return {k: v for tree in self.state_tree() for k, v in tree["params"].items()}

    @property
    def state(self) -> Leaves:
        """Batch statistics and other state by leaf path, on its submesh; invalid after the next `step`."""
        return {k: v for tree in self.state_tree() for k, v in tree["state"].items()}

    def state_tree(self, *, frozen: bool = True) -> list[StateTree]:
        """Everything that training changes, one tree a stage, for a checkpoint; invalid after the next `step`.

        Without `frozen`, it has no parameters that are not trained; `base_digest` tells which those were.
        The trees of stages that live in other processes are empty.
        """
        return self._training.trees(frozen=frozen)

    def abstract_state_tree(self, *, optimizer: bool = True, frozen: bool = True) -> list[StateTree]:
        """The shapes and shardings of `state_tree`, to restore into; without `optimizer`, of the weights alone."""
        return self._training.abstract_trees(optimizer=optimizer, frozen=frozen)

    def base_digest(self) -> str:
        """A digest, 32 hexadecimal digits, of the parameters that are not trained: of their paths and values, whatever
        the layout. All processes of the mesh call it.
        """
        params, frozen = self.params, {path for stage in self.model.parameters for path in stage.frozen}
        return digest_of_leaves({path: leaf for path, leaf in params.items() if path in frozen}, self.group)

    def load_state_tree(self, trees: Sequence[StateTree], step: int, *, donate: bool = False) -> None:
        """Continues from restored trees as they were after update `step`; with trees of weights alone, the optimizer
        begins anew. Parameters that are not trained, and adapters, stay as they are where the trees have none of them.

        The arrays are copied, unless they are donated: then they belong to the trainer, whose next step deletes them.
        """
        self._training.load(trees, donate=donate)
        self.step_number = step
        self._unchecked.clear()
        self.optimizer.reset()

    def _accumulate(
        self, batch: Batch, *, measure: bool = False, observe: Observer | None = None
    ) -> tuple[dict[int, Any], dict[int, Any], Any, MeasuredStep | None]:
        inputs = self.model.inputs(batch, self._seed_data, self.step_number)
        self.group.calls += 1
        if measure:
            return measure_step(self.model.executor, self._training.params, self._training.state, inputs)
        return *self.model.executor.run(self._training.params, self._training.state, inputs, observe), None
