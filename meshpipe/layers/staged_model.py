"""A user's layers and loss cut into stages on the submeshes of a mesh, compiled and ready to run."""

import math
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from meshpipe.compiler.cache import CompileCache
from meshpipe.compiler.compiler import Compiler
from meshpipe.layers.choice import Choice
from meshpipe.layers.examine import abstract_layers, shared_parameters
from meshpipe.layers.forwards import Forwards, check_rows
from meshpipe.layers.layer import Layer, path_hash
from meshpipe.layers.microbatches import Microbatches
from meshpipe.layers.notes import notes_on
from meshpipe.layers.shared import merge_groups, with_adapters
from meshpipe.layers.stage_function import stage_function, streams_of
from meshpipe.layers.stage_leaves import StageInfo, gathered_leaves, stage_parameters
from meshpipe.layers.stage_wiring import CutWiring, StageWiring, cut_wiring
from meshpipe.layers.task import Task
from meshpipe.layers.traces import Traces
from meshpipe.layers.trainable import describe_trained, freeze
from meshpipe.layers.wiring import wire
from meshpipe.mesh import DATA, submeshes
from meshpipe.optimizer.sums import check_names, further_sums
from meshpipe.optimizer.tied import borrowed
from meshpipe.phases import each
from meshpipe.pipeline.config import PipelineConfig
from meshpipe.pipeline.executor import Executor
from meshpipe.pipeline.remat import checkpoint_policy, remat_of_layers, remat_of_stages
from meshpipe.plan.graph import Value
from meshpipe.plan.lower import LoweredPlan, lower
from meshpipe.plan.plan import Op
from meshpipe.plan.simulate import Costs
from meshpipe.sharding import is_local, place, replicated
from meshpipe.stage.compile_stages import compile_stages, ops_of_stages
from meshpipe.stage.programs import StagePrograms
from meshpipe.stage.spec import Boundary, StageSpec, outputs_of
from meshpipe.stage.target import Target
from meshpipe.stage.traced import TracedStage


class StagedModel:
    """What a step computes: the stages, their compiled programs and the executor. It holds no training state.

    `choice` holds the plan and the cut, which `meshpipe.choose` makes. `target` is the platform for which the programs
    are written; None is the platform of the mesh. With `overwrites_state`, forwards update the state that they change
    in place.
    """

    def __init__(
        self,
        task: Task,
        *,
        mesh: Mesh,
        config: PipelineConfig,
        choice: Choice,
        target: Target | None = None,
        overwrites_state: bool = False,
    ):
        self.task, self.mesh, self.config = task, mesh, config
        self.target = target or Target.of(mesh)
        self.rules = task.rules
        self.choices = tuple(task.notes(mesh)) if task.notes is not None else ()
        """What the model has chosen for the devices of the mesh, a sentence each."""
        self.microbatches = Microbatches(task.batch, task.input, config.num_microbatches, mesh)
        layers = abstract_layers(task.layers, self.microbatches.shapes)
        tied = merge_groups(task.tied, shared_parameters(layers))
        self.tied = with_adapters(tied, {path for layer in layers for path in layer.params})
        """Groups of leaves that are one parameter: the groups that the task names, and leaves of one `nnx.Variable`."""
        self.layers = freeze(layers, task.trainable, self.tied)
        self.wiring = wire(self.layers, task.loss, task.metrics, input=task.input, fields=self.microbatches.shapes)
        ranks = submeshes(mesh)
        self.rules.check((n for layer in self.layers for names in layer.axes.values() for n in names), ranks[0])
        self.plan, self.cuts, self.layer_costs = choice.plan, choice.cuts, choice.costs
        self.remat = remat_of_stages(config.remat, self.plan.num_stages)
        """The rematerialisation of every stage; None until `choose_remat` has chosen it."""
        self.layer_remat = remat_of_layers(config.remat, [layer.class_name for layer in self.layers])
        """The policy of every layer, in stages whose rematerialisation is `layer`."""
        self.late = frozenset[str]()
        """The values that wait on the rank that makes them until another first reads them; `meshpipe.choose` says."""
        self.cache: CompileCache | None = None
        """Keeps the programs that are compiled later, for evaluation and prediction."""
        self.name = "model"
        """Begins the names of its transfers; unique among the models of this process that run between processes."""
        self._overwrites_state = overwrites_state
        self._of_rest: dict[int, Forwards] = {}
        self._unread: set[tuple[str, str]] = set()
        """What layers sow and nothing reads: their class, and the name."""
        self._meshes = [ranks[rank] for rank in self.plan.stage_ranks]
        self.local = tuple(s for s, submesh in enumerate(self._meshes) if is_local(submesh))
        """Stages on devices of this process. Of the others, only shapes are known."""
        self._layers_of = [[self.layers[i] for i in cut] for cut in self.cuts]
        others = borrowed(self.tied_and_trained)
        self.parameters = [
            stage_parameters(layers, submesh, self.rules, others)
            for layers, submesh in zip(self._layers_of, self._meshes, strict=True)
        ]
        self._gathered = self._gathered_leaves()
        self.stages = tuple(
            StageInfo.of(s, self.plan.stage_ranks[s], self.cuts[s], owned) for s, owned in enumerate(self.parameters)
        )
        self.plan = self.plan.on(self._wired().graph)
        self.programs: dict[int, StagePrograms] = {}
        """Those of the local stages, once they are compiled."""

    def _gathered_leaves(self) -> list[frozenset[str]]:
        """For every stage, the paths of the leaves that `data` splits between steps."""
        if not self._splits_data:
            return [frozenset()] * len(self.cuts)
        gathered = [gathered_leaves(layers, self.rules) for layers in self._layers_of]
        if self.rules.gathered and not any(gathered):
            raise ValueError(
                "Fully sharded parameters must name an axis for the data axis to split. Got a model that names none of "
                f"{', '.join(self.rules.gathered)}. Name it with nnx.with_partitioning, or keep parameters replicated, "
                "as they are by default."
            )
        return gathered

    @property
    def _splits_data(self) -> bool:
        return self.mesh.shape.get(DATA, 1) > 1

    def release(self) -> None:
        """Drops the references to ready-made modules and to the example batch, which are not needed after set-up."""
        self.task = replace(self.task, layers=(), batch=self.microbatches.shapes)
        for layer in self.layers:
            layer.origin.release()

    @property
    def notes(self) -> tuple[str, ...]:
        """What is trained, and effects of how the layers are written, one sentence each."""
        named = {frozenset(group) for group in self.task.tied}
        groups = [group for group in shared_parameters(self.layers) if frozenset(group) not in named]
        return (describe_trained(self.layers), *notes_on(self.layers, groups, sorted(self._unread)))

    @property
    def tied_and_frozen(self) -> tuple[tuple[str, ...], ...]:
        """The groups of `tied` that are not trained."""
        frozen = frozenset().union(*(layer.frozen for layer in self.layers))
        return tuple(group for group in self.tied if group[0] in frozen)

    @property
    def tied_and_trained(self) -> tuple[tuple[str, ...], ...]:
        return tuple(group for group in self.tied if group not in self.tied_and_frozen)

    @property
    def stage_costs(self) -> Costs | None:
        """The times of the stages in seconds; None where the layers' costs are not known."""
        return None if self.layer_costs is None else self.layer_costs.of_stages(self.cuts)

    @property
    def layers_on_submeshes(self) -> list[tuple[Layer, Mesh]]:
        """The layers of the local stages, in order."""
        return [(self.layers[i], self._meshes[s]) for s in self.local for i in self.cuts[s]]

    @cached_property
    def lowered(self) -> LoweredPlan:
        """The plan with its transfers, the same in every process."""
        return lower(self.plan, reduces=self._splits_data, late=self.late)

    def _wired(self, *, loss: bool = True, metrics: bool = False) -> CutWiring:
        """The values that stages hand to each other, also those that only the loss or the metrics read."""
        trains = [bool(owned.params) for owned in self.parameters]
        return cut_wiring(self.wiring, self.cuts, trains, loss=loss, metrics=metrics)

    def trace(self, remat: Sequence[str] | None = None) -> list[TracedStage]:
        """Traces every stage for training; compiles and allocates nothing. The result has the shapes that a step keeps.

        `remat` names the rematerialisation of every stage, in place of the model's.
        """
        names = self.remat if remat is None else remat
        assert names is not None, "remat is to be chosen first"
        return list(self._trace(range(self.plan.num_stages), remat=names, train=True).stages.values())

    def value_bytes(self) -> dict[Value, int]:
        """What a device of a rank holds of each value that stages hand to each other, for one microbatch. Finds shapes
        only; the same in every process.
        """
        values = self._trace((), remat=("none",) * self.plan.num_stages, train=True).values
        size = self.microbatches.size // self.microbatches.count
        return {
            value: sum(
                math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
                for leaf in boundary.on(self._meshes[value.source], size)
            )
            for value, boundary in values.items()
        }

    def compile(
        self,
        also: Sequence[Callable[[], None]] = (),
        compiler: Compiler | None = None,
        name: str = "model",
        check: Callable[["StagedModel"], None] | None = None,
    ) -> None:
        """Traces the local stages in turn, then compiles them in threads, beside the functions `also`.

        `name` must be unique among the models of this process; the names of its transfers begin with it. `check` is
        called in between.
        """
        self.name = name
        compiler = compiler or Compiler()
        self.cache = compiler.cache
        self.trace_to_run()
        if check is not None:
            check(self)
        _ = self._path_hashes  # placed now, not in the first step
        self.programs = self.compile_programs(compiler, also)
        self.executor = Executor(f"{name}/train", self.lowered, self._meshes, self.traced, self.programs)

    def trace_to_run(self) -> None:
        """Traces the local stages for training. Allocates nothing, so the devices of the mesh need not be there."""
        assert self.remat is not None, "remat is to be chosen first"
        self.traced, _, sums, _ = self._trace(self.local, remat=self.remat, train=True)
        self._check_metrics()
        self.parameters = [replace(owned, sums=further_sums(sums[s])) for s, owned in enumerate(self.parameters)]
        for s, stage in self.traced.items():
            once = self.parameters[s].after_step
            written = frozenset[str]() if once is None else once.writes
            self.parameters[s] = replace(self.parameters[s], fixed=stage.fixed_paths - written)

    def compile_programs(self, compiler: Compiler, also: Sequence[Callable[[], None]] = ()) -> dict[int, StagePrograms]:
        """Compiles what `trace_to_run` has traced in threads, beside the functions `also`. Allocates nothing."""
        assert self.remat is not None, "remat is to be chosen first"
        fused = self.plan.fusible_stage if self.target.fuses_last_stage else None
        return compile_stages(self.traced, ops_of_stages(self.plan), self.remat, compiler, also, fused)

    def _check_metrics(self) -> None:
        """Raises now what the metrics, or layers in evaluation mode, would raise at the first evaluation.

        Where the last stage is local, all stages are traced forward, for their shapes only.
        """
        if self.task.metrics is not None and self.plan.num_stages - 1 in self.local:
            self._trace((), remat=("none",) * self.plan.num_stages, train=False)

    @cached_property
    def evaluation(self) -> Forwards:
        """Sums the loss and the metrics of whole batches; compiled when first used."""
        return self.forwards("evaluate", self.microbatches)

    def evaluation_of_rest(self, size: int) -> Forwards:
        """The same for a batch of one microbatch of `size` examples; the data axis need not divide it."""
        if size not in self._of_rest:
            self._of_rest[size] = self.forwards(f"evaluate {size}", self.microbatches.resized(size, 1))
        return self._of_rest[size]

    @cached_property
    def prediction(self) -> Forwards:
        """Keeps the outputs of the last layer, given the fields that layers read; compiled when first used."""
        size, count = self.microbatches.size, self.microbatches.count
        microbatches = self.microbatches.resized(size, count, self.wiring.fields)
        return self.forwards("predict", microbatches, outputs=True)

    def forwards(self, name: str, batches: Microbatches, *, outputs: bool = False, what: str = "") -> Forwards:
        """Compiles the forwards for batches of these shapes: to sum up the loss and the metrics, or for outputs. `what`
        calls them, in place of their `name`.
        """
        remat = ("none",) * self.plan.num_stages
        wired = self._wired(loss=not outputs, metrics=not outputs)
        traced, output, sums, _ = self._trace(
            self.local, remat=remat, train=False, fields=batches.fields, outputs=outputs
        )
        if outputs:
            check_rows(output[-1], batches.size // batches.count)
        return Forwards(
            name=f"{self.name}/{name}",
            plan=self.plan,
            graph=wired.graph,
            microbatches=batches,
            meshes=self._meshes,
            traced=traced,
            programs=compile_stages(
                traced,
                dict.fromkeys(traced, frozenset({Op.FORWARD})),
                remat,
                Compiler(self.cache),
                what=f"Compiling to {what or name},",
            ),
            path_hashes=self._path_hashes,
            adds_up_early=any(sums[s] for s in range(self.plan.num_stages - 1)),
            output=output[-1] if outputs else None,
        )

    def place_seed(self, seed: int) -> dict[int, jax.Array]:
        """The seed's key data on every local stage's submesh."""
        data = np.asarray(jax.random.key_data(jax.random.key(seed)))
        return {s: place(data, replicated(self._meshes[s])) for s in self.local}

    def inputs(self, batch: Mapping[str, Any], seed: Mapping[int, jax.Array], step: int) -> dict[int, Any]:
        """What each local stage reads in a step: fields of the batch in microbatches, seed data and step number."""
        return self.microbatches.place(self.traced, batch, step, seed, self._path_hashes)

    def rows_read(self, *, evaluation: bool = False) -> np.ndarray:
        """Which rows of a global batch of full size the local stages read."""
        return self.microbatches.rows_read(self.evaluation.traced if evaluation else self.traced)

    def _trace(
        self,
        wanted: Collection[int],
        *,
        remat: Sequence[str],
        train: bool,
        fields: Mapping[str, jax.ShapeDtypeStruct] | None = None,
        outputs: bool = False,
    ) -> Traces:
        """Traces the wanted stages. Of the others, it finds only what they hand on and add up.

        With `outputs`, the last stage returns the value of the last layer, not a loss.
        """
        fields = self.microbatches.fields if fields is None else fields
        traced: dict[int, TracedStage] = {}
        seen: dict[Hashable, TracedStage] = {}
        known: dict[Hashable, tuple[tuple[Boundary, ...], tuple[str, ...]]] = {}
        sums: dict[int, tuple[str, ...]] = {}
        wired = self._wired(loss=not outputs, metrics=not train and not outputs)
        graph, made = wired.graph, dict[Value, Boundary]()
        after: tuple[Boundary, ...] = ()
        for s in each("Tracing", "stage", range(self.plan.num_stages)):
            before = [made[value] for value in graph.inputs(s)]
            spec = self._spec(s, wired, remat[s], train=train, outputs=outputs)
            kind = self._kind(
                spec, wired.stages[s], before, remat[s], has_loss=s == self.plan.num_stages - 1 and not outputs
            )
            if s not in wanted:
                if kind not in known:
                    known[kind] = outputs_of(spec, before, fields)
                after, sums[s] = known[kind]
            else:
                is_known = kind in seen
                traced[s] = seen[kind].shared_with(spec, before) if is_known else TracedStage(spec, before, fields)
                seen.setdefault(kind, traced[s])
                after, sums[s] = traced[s].boundaries_out, traced[s].sum_names
            made.update(zip(graph.outputs(s), after, strict=False))  # an output that is kept is no value of the graph
        check_names(name for names in sums.values() for name in names)
        return Traces(traced, after, sums, made)

    def _spec(self, s: int, wired: CutWiring, remat: str, *, train: bool, outputs: bool) -> StageSpec:
        """A stage before it is traced; arguments as those of `_trace`."""
        graph, owned, is_last = wired.graph, self.parameters[s], s == self.plan.num_stages - 1
        by_layer, has_backward = remat == "layer", train and graph.has_backward(s)
        return StageSpec(
            index=s,
            mesh=self._meshes[s],
            target=self.target,
            function=stage_function(
                s,
                self._layers_of[s],
                wiring=wired.stages[s],
                loss=self.task.loss if is_last and not outputs else None,
                metrics=None if train else self.task.metrics,
                policies=[checkpoint_policy(self.layer_remat[i]) if by_layer else None for i in self.cuts[s]],
                unread=None if outputs else self._unread,
                outputs=outputs and is_last,
                train=train,
            ),
            params=owned.params,
            state=owned.state,
            streams=len(self._streams(s)),
            gathered=self._gathered[s],
            has_backward=has_backward,
            gradients_in=tuple(has_backward and graph.has_gradient(value) for value in graph.inputs(s)),
            readers=tuple(len(value.targets) for value in graph.outputs(s)),
            checkpoint_policy=None if remat == "full" else checkpoint_policy(remat),
            overwrites_state=self._overwrites_state,
        )

    def _streams(self, stage: int) -> list[str]:
        return streams_of(self._layers_of[stage])

    @cached_property
    def _path_hashes(self) -> dict[int, jax.Array]:
        """Hashes, on the submesh of each stage with random streams, that make its draws differ from other stages'."""
        hashes = {s: [path_hash(path) for path in self._streams(s)] for s in self.local}
        return {
            s: place(np.array(found, np.uint32), replicated(self._meshes[s])) for s, found in hashes.items() if found
        }

    def _kind(
        self, spec: StageSpec, wiring: StageWiring, boundaries: Sequence[Boundary], remat: str, *, has_loss: bool
    ) -> Hashable:
        """A key that is equal for the stages of one `_trace` call that can share a trace; their paths may differ."""
        kinds = tuple(self.layers[i].kind for i in self.cuts[spec.index])
        leaves = [*spec.params.values(), *spec.state.values()]
        shapes = tuple((leaf.shape, leaf.dtype, leaf.sharding.spec) for leaf in leaves)
        gathered = tuple(path in spec.gathered for path in (*spec.params, *spec.state))
        policies = tuple(self.layer_remat[i] for i in self.cuts[spec.index])
        before = tuple(boundary.kind for boundary in boundaries)
        gradients = spec.has_backward, spec.gradients_in, spec.readers
        return has_loss, wiring, gradients, kinds, shapes, gathered, remat, policies, before
