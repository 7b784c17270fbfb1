"""A user's layers and loss cut into stages on the submeshes of a mesh, compiled and ready to run."""

from collections.abc import Callable, Collection, Hashable, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from meshpipe.compile_cache import CompileCache
from meshpipe.compiler import Compiler
from meshpipe.config import Config
from meshpipe.data import example_batch
from meshpipe.initialise import placed
from meshpipe.layer import Layer, LayerLike, Randomness, abstract_layers, path_hash
from meshpipe.layer_costs import ModelCosts
from meshpipe.mesh import DATA, make_mesh, submeshes
from meshpipe.optimizer import StageParameters
from meshpipe.partition import partition
from meshpipe.pipeline.config import CHECKPOINT_POLICIES, PipelineConfig
from meshpipe.pipeline.executor import Executor
from meshpipe.pipeline.lower import Program, lower
from meshpipe.pipeline.plan import Op, Plan
from meshpipe.pipeline.programs import StagePrograms, compile_stage, copy_stage
from meshpipe.pipeline.schedules import forwards_of, make_plan
from meshpipe.pipeline.simulate import Costs
from meshpipe.pipeline.stage import Boundary, StageFunction, StageSpec, TracedStage, boundary_after
from meshpipe.pipeline.validate import validate
from meshpipe.sharding import ShardingRules, is_local, place, replicated
from meshpipe.tied import borrowed

Loss = Callable[[Any, Mapping[str, jax.Array]], tuple[jax.Array, jax.Array]]
"""Output of the last layer and the microbatch -> sum of losses, weight."""
Metrics = Callable[[Any, Mapping[str, jax.Array]], Mapping[str, tuple[jax.Array, jax.Array]]]
"""Output of the last layer and the microbatch -> further sums and weights to report in evaluation."""
_PLACED = ("seed", "paths")
"""Inputs of a stage that stay the same in every step."""


@dataclass(frozen=True)
class StageInfo:
    """One stage as a table shows it."""

    index: int
    rank: int
    layers: range
    submesh: Mesh
    parameter_count: int
    parameter_bytes: int
    """Over the whole submesh, each array counted once."""


@dataclass(frozen=True)
class Choice:
    """A plan and a cut that were chosen for a model, where its config names a way to choose."""

    plan: Plan
    cuts: tuple[range, ...]
    """The layers of every stage."""
    costs: ModelCosts | None
    """What the layers were found to cost; None where nothing was measured or given."""


class StagedModel:
    """What a step computes: the stages, their compiled programs and the executor. It holds no training state.

    `choice` has the plan and the cut; None takes those that the config names. Raises `ValueError` when these have to
    be chosen first, as `meshpipe.choose` does.
    """

    def __init__(
        self,
        layers: Sequence[LayerLike],
        loss: Loss,
        *,
        batch: Mapping[str, Any],
        mesh: Mesh,
        input: str,
        config: PipelineConfig,
        metrics: Metrics | None = None,
        tied: Sequence[Sequence[str]] = (),
        rules: ShardingRules | None = None,
        choice: Choice | None = None,
    ):
        self.mesh, self.rules, self.config, self.tied = mesh, rules or ShardingRules(), config, tied
        self.batch_shapes = _batch_shapes(batch, input, config.num_microbatches, mesh)
        self.layers = abstract_layers(layers, self.batch_shapes)
        self.loss, self.input, self._metrics = loss, input, metrics
        ranks = submeshes(mesh)
        choice = choice or _as_named(config, len(ranks), len(self.layers))
        self.plan, self.cuts, self.layer_costs = choice.plan, choice.cuts, choice.costs
        self.remat = config.remat_of_stages(self.plan.num_stages)
        """The rematerialisation of every stage; None where it is yet to be chosen, as `choose_remat` does."""
        self._cache: CompileCache | None = None
        self._evaluation_traced: dict[int, TracedStage] | None = None
        self._meshes = [ranks[rank] for rank in self.plan.stage_ranks]
        self.local = tuple(s for s, submesh in enumerate(self._meshes) if is_local(submesh))
        """Stages of which this process has devices; the others are known by their shapes alone."""
        self.parameters = [self._parameters(s, borrowed(tied)) for s in range(self.plan.num_stages)]
        self.stages = tuple(self._info(s) for s in range(self.plan.num_stages))

    @property
    def stage_costs(self) -> Costs | None:
        """The times of the stages in seconds; None where the layers' costs are not known."""
        return None if self.layer_costs is None else self.layer_costs.of_stages(self.cuts)

    @property
    def layers_on_submeshes(self) -> list[tuple[Layer, Mesh]]:
        """The layers of the local stages, in order."""
        return [(self.layers[i], self._meshes[s]) for s in self.local for i in self.cuts[s]]

    @classmethod
    def from_config(cls, config: Config) -> "StagedModel":
        """The model of a recipe on the mesh it asks for; nothing is allocated or compiled.

        Raises `ValueError` when the parts of the config do not fit together or the devices are too few.
        """
        return cls(
            config.model.layers(),
            config.model.loss,
            batch=example_batch(config.data.train_source(), config.batch_size),
            mesh=make_mesh(config.mesh.pipeline, config.mesh.data, config.mesh.tensor),
            input=config.model.input,
            config=config.pipeline,
            metrics=config.model.metrics,
            tied=config.model.tied(),
        )

    @cached_property
    def program(self) -> Program:
        """The plan with its transfers, the same in every process."""
        return lower(self.plan)

    def trace(self, remat: Sequence[str] | None = None) -> list[TracedStage]:
        """Every stage traced for training, without compiling or allocating: the shapes of all that a step keeps.

        `remat` has other names for the stages than those of the model.
        """
        names = self.remat if remat is None else remat
        assert names is not None, "remat is to be chosen first"
        traced = self._trace(range(self.plan.num_stages), remat=names, train=True)
        return list(traced.values())

    def compile(self, also: Sequence[Callable[[], None]] = (), compiler: Compiler | None = None) -> None:
        """Traces the local stages one after the other, then compiles them, and `also`, in threads, where XLA runs at
        once.
        """
        assert self.remat is not None, "remat is to be chosen first"
        self.traced = self._trace(self.local, remat=self.remat, train=True)
        _ = self._path_hashes  # placed now, not in the first step
        compiler = compiler or Compiler()
        self._cache = compiler.cache
        ops = {action.op for action in self.plan.actions}
        with ThreadPoolExecutor() as pool:
            self.programs = self._compile(self.traced, ops, self.remat, pool, compiler, also)
        self.executor = Executor("train", self.program, self._meshes, self.traced, self.programs)

    def _compile(
        self,
        traced: dict[int, TracedStage],
        ops: Set[Op],
        remat: Sequence[str],
        pool: ThreadPoolExecutor,
        compiler: Compiler,
        also: Sequence[Callable[[], None]] = (),
    ) -> dict[int, StagePrograms]:
        """Every traced stage's programs; a twin whose programs cannot be copied is traced again, in its place.

        `also` is done while XLA, which takes longest for the stages, is at work.
        """

        def build(stage: TracedStage) -> StagePrograms:
            return compile_stage(stage, ops, remat=remat[stage.spec.index], compiler=compiler)

        originals = [stage for stage in traced.values() if stage.original is None]
        building = {stage.spec.index: pool.submit(build, stage) for stage in originals}
        others = [pool.submit(task) for task in also]
        built = {index: future.result() for index, future in building.items()}

        def copied(stage: TracedStage) -> StagePrograms | None:
            if stage.original is None:
                return built[stage.spec.index]
            return copy_stage(built[stage.original.spec.index], stage.spec.mesh, compiler)

        programs: dict[int, StagePrograms] = {}
        for index, found in zip(traced, list(pool.map(copied, traced.values())), strict=True):
            if found is None:
                traced[index] = traced[index].again()
            programs[index] = found or build(traced[index])
        for other in others:
            other.result()
        return programs

    @cached_property
    def evaluation(self) -> tuple[Executor, tuple[str, ...]]:
        """A forward-only executor, compiled at its first use, and the names of the means that it sums up, which are
        known where the last stage is local.
        """
        plan = forwards_of(self.plan)
        names: list[str] = []
        remat = ("none",) * self.plan.num_stages
        traced = self._evaluation_traced = self._trace(self.local, remat=remat, train=False, names=names)
        with ThreadPoolExecutor() as pool:
            programs = self._compile(traced, {Op.FORWARD}, remat, pool, Compiler(self._cache))
        return Executor("evaluate", lower(plan), self._meshes, traced, programs), ("loss", *names)

    def place_seed(self, seed: int) -> dict[int, jax.Array]:
        """The seed's key data on every local stage's submesh."""
        data = np.asarray(jax.random.key_data(jax.random.key(seed)))
        return {s: place(data, replicated(self._meshes[s])) for s in self.local}

    def inputs(self, batch: Mapping[str, Any], seed: Mapping[int, jax.Array], step: int) -> dict[int, Any]:
        """What every local stage reads of a global batch, split into microbatches on its submesh."""
        return self._inputs(self.traced, batch, seed, step)

    def evaluation_inputs(self, batch: Mapping[str, Any], seed: Mapping[int, jax.Array]) -> dict[int, Any]:
        """The same for `evaluation`."""
        _ = self.evaluation
        assert self._evaluation_traced is not None
        return self._inputs(self._evaluation_traced, batch, seed, 0)

    def _inputs(
        self, traced: Mapping[int, TracedStage], batch: Mapping[str, Any], seed: Mapping[int, jax.Array], step: int
    ) -> dict[int, Any]:
        check_batch(batch, self.batch_shapes)
        fields: dict[str, Any] = {name: self._microbatches(np.asarray(value)) for name, value in batch.items()}
        fields["step"] = np.uint32(step)
        wanted = {s: [fields[name] for name in stage.input_names if name not in _PLACED] for s, stage in traced.items()}
        shardings = {
            s: [
                shape.sharding
                for name, shape in zip(stage.input_names, stage.inputs, strict=True)
                if name not in _PLACED
            ]
            for s, stage in traced.items()
        }
        arrays = place(wanted, shardings)
        placed = {s: {"seed": seed[s], "paths": self._path_hashes.get(s)} for s in traced}
        return {
            s: tuple(v for name, v in placed[s].items() if name in stage.input_names) + tuple(arrays[s])
            for s, stage in traced.items()
        }

    def rows_read(self, *, evaluation: bool = False) -> np.ndarray:
        """Which rows of a global batch the local stages read, in training or in evaluation."""
        traced = self._evaluation_traced if evaluation else self.traced
        assert traced is not None, "compile first"
        size = next(iter(self.batch_shapes.values())).shape[0]
        positions = self._microbatches(np.arange(size))
        needed = np.zeros(size, bool)
        for stage in traced.values():
            for name, shape in zip(stage.input_names, stage.inputs, strict=True):
                if name in self.batch_shapes:
                    assert shape.sharding is not None
                    for index in shape.sharding.addressable_devices_indices_map(shape.shape).values():
                        needed[positions[index[:2]]] = True
        return np.flatnonzero(needed)

    def _microbatches(self, value: np.ndarray) -> np.ndarray:
        return value.reshape(self.config.num_microbatches, -1, *value.shape[1:])

    def _trace(
        self, wanted: Collection[int], *, remat: Sequence[str], train: bool, names: list[str] | None = None
    ) -> dict[int, TracedStage]:
        """The wanted stages traced; of others only the shapes of what they hand on are found out."""
        fields = {
            name: jax.ShapeDtypeStruct(
                (self.config.num_microbatches, s.shape[0] // self.config.num_microbatches, *s.shape[1:]), s.dtype
            )
            for name, s in self.batch_shapes.items()
        }
        traced: dict[int, TracedStage] = {}
        seen: dict[Hashable, TracedStage] = {}
        handed_on: dict[Hashable, Boundary] = {}
        boundary: Boundary | None = None
        for s, (mesh, owned) in enumerate(zip(self._meshes, self.parameters, strict=True)):
            spec = StageSpec(
                index=s,
                mesh=mesh,
                function=self._function(s, train=train, names=names),
                params=owned.params,
                state=owned.state,
                is_first=s == 0,
                is_last=s == self.plan.num_stages - 1,
                streams=len(self._streams(s)),
                checkpoint_policy=_policy(remat[s]),
            )
            kind = self._kind(spec, boundary, remat[s])
            if s not in wanted:
                if s > max(wanted):
                    break
                if kind not in handed_on:
                    handed_on[kind] = boundary_after(spec, boundary, fields)
                boundary = handed_on[kind]
                continue
            if boundary is not None and kind in seen:
                traced[s] = seen[kind].twin(spec, boundary)
            else:
                traced[s] = seen[kind] = TracedStage(spec, boundary, fields)
            boundary = traced[s].boundary_out
        return traced

    def _streams(self, stage: int) -> list[str]:
        return [path for i in self.cuts[stage] for path in self.layers[i].streams]

    @cached_property
    def _path_hashes(self) -> dict[int, jax.Array]:
        """On the submesh of every stage with random streams, what tells its draws from those of other stages."""
        hashes = {s: [path_hash(path) for path in self._streams(s)] for s in self.local}
        return {
            s: place(np.array(found, np.uint32), replicated(self._meshes[s])) for s, found in hashes.items() if found
        }

    def _kind(self, spec: StageSpec, boundary: Boundary | None, remat: str) -> Hashable:
        """Equal for stages that one trace serves, among those of one call of `_trace`; their paths may differ."""
        kinds = tuple(self.layers[i].kind for i in self.cuts[spec.index])
        leaves = [*spec.params.values(), *spec.state.values()]
        shapes = tuple((leaf.shape, leaf.dtype, leaf.sharding.spec) for leaf in leaves)
        return spec.is_first, spec.is_last, kinds, shapes, remat, None if boundary is None else boundary.kind

    def _function(self, stage: int, *, train: bool, names: list[str] | None) -> StageFunction:
        layers = [self.layers[i] for i in self.cuts[stage]]
        streams = self._streams(stage)
        is_first, is_last = stage == 0, stage == self.plan.num_stages - 1

        def run(params: Any, state: Any, activation: Any, batch: Any, randomness: Any) -> tuple[Any, Any]:
            value = batch[self.input] if is_first else activation
            seed, paths, step, microbatch = randomness
            draws = Randomness(seed, step, microbatch, {path: paths[i] for i, path in enumerate(streams)})
            for layer in layers:
                try:
                    value, after = layer(params, state, value, batch, draws, train=train)
                except (TypeError, ValueError, KeyError) as error:
                    shapes = jax.tree.map(lambda leaf: f"{leaf.dtype}{list(leaf.shape)}", value)
                    raise ValueError(
                        f"Each layer must take what the one before returns. {layer.path} (stage {stage}) cannot take "
                        f"{shapes}: {error}"
                    ) from error
                state = {**state, **after}
            if is_last:
                extra = self._metrics(value, batch) if self._metrics and names is not None else {}
                if names is not None:
                    names[:] = list(extra)
                try:
                    result = self.loss(value, batch)
                except (TypeError, ValueError, KeyError) as error:
                    shapes = {name: f"{field.dtype}{list(field.shape)}" for name, field in batch.items()}
                    raise ValueError(
                        f"The loss must take the last layer's output and a microbatch, which has {shapes}. "
                        f"Got {type(error).__name__}: {error}"
                    ) from error
                value = (*_sum_and_weight(result), *(v for pair in extra.values() for v in pair))
            return value, state

        return run

    def _parameters(self, stage: int, borrowed_leaves: frozenset[str]) -> StageParameters:
        params: dict[str, jax.ShapeDtypeStruct] = {}
        state: dict[str, jax.ShapeDtypeStruct] = {}
        for index in self.cuts[stage]:
            of_params, of_state = placed(self.layers[index], self._meshes[stage], self.rules)
            params.update(of_params)
            state.update(of_state)
        return StageParameters(self._meshes[stage], params, state, borrowed_leaves.intersection(params))

    def _info(self, stage: int) -> StageInfo:
        leaves = self.parameters[stage].params.values()
        return StageInfo(
            index=stage,
            rank=self.plan.stage_ranks[stage],
            layers=self.cuts[stage],
            submesh=self._meshes[stage],
            parameter_count=sum(leaf.size for leaf in leaves),
            parameter_bytes=sum(leaf.size * leaf.dtype.itemsize for leaf in leaves),
        )


def training_plan(config: PipelineConfig, num_ranks: int) -> Plan:
    """The plan of a schedule that has a name or a file.

    Raises `ValueError` when there is none, it breaks a rule, or it trains nothing.
    """
    plan = make_plan(config.schedule, num_ranks, config.num_microbatches, stages_per_rank=config.stages_per_rank)
    validate(plan)
    if plan.forward_only:
        raise ValueError(
            f"Training needs a schedule with backwards. Got {config.schedule!r}, which has none. Choose e.g. 1f1b."
        )
    return plan


def _as_named(config: PipelineConfig, num_ranks: int, num_layers: int) -> Choice:
    if config.partition in ("cost", "measured"):
        raise ValueError(
            "Stages must be known before they are made. "
            f"Got partition {config.partition!r}, which meshpipe.choose.Chooser and meshpipe.Trainer resolve."
        )
    plan = training_plan(config, num_ranks)
    return Choice(plan, partition(num_layers, plan.num_stages, config.boundaries), None)


def _policy(remat: str) -> Callable[..., bool] | None:
    return getattr(jax.checkpoint_policies, remat) if remat in CHECKPOINT_POLICIES else None


def check_batch(batch: Mapping[str, Any], shapes: Mapping[str, jax.ShapeDtypeStruct]) -> None:
    """Raises `ValueError` when fields or shapes differ from those that the stages were compiled for."""
    found = {name: np.shape(value) for name, value in batch.items()}
    expected = {name: shape.shape for name, shape in shapes.items()}
    if found != expected:
        raise ValueError(
            f"Every batch must have the fields and shapes of the example batch, {expected}. Got {found}. "
            "Drop or pad the last, smaller batch (with weight 0 in the loss)."
        )


def _batch_shapes(
    batch: Mapping[str, Any], input: str, num_microbatches: int, mesh: Mesh
) -> dict[str, jax.ShapeDtypeStruct]:
    if input not in batch:
        raise ValueError(
            f"`input` must name a field of the batch. Got {input!r}; the batch has {', '.join(batch) or 'no fields'}."
        )
    sizes = {name: (np.shape(value) or (0,))[0] for name, value in batch.items()}
    if len(set(sizes.values())) > 1 or 0 in sizes.values():
        raise ValueError(f"Every batch field must have the same leading dim, the batch size. Got {sizes}.")
    parts = num_microbatches * mesh.shape.get(DATA, 1)
    if sizes[input] % parts:
        raise ValueError(
            f"The batch size must be a multiple of num_microbatches * data. Got {sizes[input]} with "
            f"{num_microbatches} * {mesh.shape.get(DATA, 1)} = {parts}. Choose a multiple of {parts}."
        )
    return {
        name: jax.ShapeDtypeStruct(np.shape(v), jax.dtypes.canonicalize_dtype(v.dtype)) for name, v in batch.items()
    }


def _sum_and_weight(result: Any) -> tuple[Any, Any]:
    if not isinstance(result, tuple | list) or len(result) != 2 or any(np.shape(v) for v in result):
        shapes = jax.tree.map(np.shape, result)
        raise ValueError(
            "A loss must return two scalars: the sum of the losses over the microbatch, and their weight (how many "
            f"there are). Got {shapes}. Write e.g. `return losses.sum(), losses.size`."
        )
    return result[0], result[1]
