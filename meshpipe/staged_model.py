"""A user's layers and loss cut into stages on the submeshes of a mesh, compiled and ready to run."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from meshpipe.config import Config
from meshpipe.data import example_batch
from meshpipe.initialise import placed
from meshpipe.layer import Layer, LayerLike, Randomness, abstract_layers
from meshpipe.mesh import DATA, make_mesh, submeshes
from meshpipe.optimizer import StageParameters
from meshpipe.partition import partition
from meshpipe.pipeline.config import CHECKPOINT_POLICIES, PipelineConfig
from meshpipe.pipeline.executor import Executor
from meshpipe.pipeline.lower import lower
from meshpipe.pipeline.plan import Op, Plan
from meshpipe.pipeline.programs import compile_stage
from meshpipe.pipeline.schedules import forwards_of, make_plan
from meshpipe.pipeline.stage import Boundary, StageFunction, StageSpec, TracedStage
from meshpipe.pipeline.validate import validate
from meshpipe.sharding import ShardingRules, replicated
from meshpipe.tied import borrowed

Loss = Callable[[Any, Mapping[str, jax.Array]], tuple[jax.Array, jax.Array]]
"""Output of the last layer and the microbatch -> sum of losses, weight."""
Metrics = Callable[[Any, Mapping[str, jax.Array]], Mapping[str, tuple[jax.Array, jax.Array]]]
"""Output of the last layer and the microbatch -> further sums and weights to report in evaluation."""


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


class StagedModel:
    """What a step computes: the stages, their compiled programs and the executor. It holds no training state."""

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
    ):
        self.mesh, self.rules, self.config, self.tied = mesh, rules or ShardingRules(), config, tied
        self.batch_shapes = _batch_shapes(batch, input, config.num_microbatches, mesh)
        self.layers = abstract_layers(layers, self.batch_shapes)
        self.loss, self.input, self._metrics = loss, input, metrics
        ranks = submeshes(mesh)
        self.plan: Plan = make_plan(
            config.schedule, len(ranks), config.num_microbatches, stages_per_rank=config.stages_per_rank
        )
        validate(self.plan)
        if self.plan.forward_only:
            raise ValueError(
                f"Training needs a schedule with backwards. Got {config.schedule!r}, which has none. Choose e.g. 1f1b."
            )
        self.remat = config.remat_of_stages(self.plan.num_stages)
        """The rematerialisation of every stage; None where it is yet to be chosen, as `choose_remat` does."""
        self.cuts = partition(len(self.layers), self.plan.num_stages, config.boundaries)
        self._meshes = [ranks[rank] for rank in self.plan.stage_ranks]
        self.parameters = [self._parameters(s, borrowed(tied)) for s in range(self.plan.num_stages)]
        self.stages = tuple(self._info(s) for s in range(self.plan.num_stages))

    @property
    def layers_on_submeshes(self) -> list[tuple[Layer, Mesh]]:
        return [(self.layers[i], mesh) for cut, mesh in zip(self.cuts, self._meshes, strict=True) for i in cut]

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

    def trace(self, remat: Sequence[str] | None = None) -> list[TracedStage]:
        """Every stage traced for training, without compiling or allocating: the shapes of all that a step keeps.

        `remat` has other names for the stages than those of the model.
        """
        names = self.remat if remat is None else remat
        assert names is not None, "remat is to be chosen first"
        return self._trace(remat=names, train=True)

    def compile(self, also: Sequence[Callable[[], None]] = ()) -> None:
        """Traces the stages one after the other, then compiles them, and `also`, in threads, where XLA runs at once."""
        traced = self.trace()
        ops = {action.op for action in self.plan.actions}
        with ThreadPoolExecutor() as pool:
            others = [pool.submit(task) for task in also]
            programs = list(
                pool.map(lambda stage, name: compile_stage(stage, ops, remat=name), traced, self.remat or ())
            )
            for other in others:
                other.result()
        self.traced = traced
        self.executor = Executor(lower(self.plan), dict(enumerate(traced)), dict(enumerate(programs)))

    @cached_property
    def evaluation(self) -> tuple[Executor, tuple[str, ...]]:
        """A forward-only executor, compiled at its first use, and the names of the means that it sums up."""
        plan = forwards_of(self.plan)
        names: list[str] = []
        traced = self._trace(remat=("none",) * self.plan.num_stages, train=False, names=names)
        self._evaluation_traced = traced
        with ThreadPoolExecutor() as pool:
            programs = list(pool.map(lambda stage: compile_stage(stage, {Op.FORWARD}), traced))
        return Executor(lower(plan), dict(enumerate(traced)), dict(enumerate(programs))), ("loss", *names)

    def place_seed(self, seed: int) -> list[jax.Array]:
        """The seed's key data on every stage's submesh."""
        data = jax.random.key_data(jax.random.key(seed))
        return [jax.device_put(data, replicated(mesh)) for mesh in self._meshes]

    def inputs(self, batch: Mapping[str, Any], seed: Sequence[jax.Array], step: int) -> dict[int, Any]:
        """What every stage reads of a global batch, split into microbatches on its submesh."""
        return self._inputs(self.traced, batch, seed, step)

    def evaluation_inputs(self, batch: Mapping[str, Any], seed: Sequence[jax.Array]) -> dict[int, Any]:
        """The same for `evaluation`."""
        _ = self.evaluation
        return self._inputs(self._evaluation_traced, batch, seed, 0)

    def _inputs(
        self, traced: Sequence[TracedStage], batch: Mapping[str, Any], seed: Sequence[jax.Array], step: int
    ) -> dict[int, Any]:
        check_batch(batch, self.batch_shapes)
        fields: dict[str, Any] = {name: self._microbatches(np.asarray(value)) for name, value in batch.items()}
        fields["step"] = np.uint32(step)
        wanted = [[fields[name] for name in stage.input_names if name != "seed"] for stage in traced]
        shardings = [
            [shape.sharding for name, shape in zip(stage.input_names, stage.inputs, strict=True) if name != "seed"]
            for stage in traced
        ]
        arrays = jax.device_put(wanted, shardings)
        return {
            s: ((seed[s],) if "seed" in stage.input_names else ()) + tuple(arrays[s]) for s, stage in enumerate(traced)
        }

    def _microbatches(self, value: np.ndarray) -> np.ndarray:
        return value.reshape(self.config.num_microbatches, -1, *value.shape[1:])

    def _trace(self, *, remat: Sequence[str], train: bool, names: list[str] | None = None) -> list[TracedStage]:
        fields = {
            name: jax.ShapeDtypeStruct(
                (self.config.num_microbatches, s.shape[0] // self.config.num_microbatches, *s.shape[1:]), s.dtype
            )
            for name, s in self.batch_shapes.items()
        }
        traced: list[TracedStage] = []
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
                checkpoint_policy=_policy(remat[s]),
            )
            traced.append(TracedStage(spec, boundary, fields))
            boundary = traced[-1].boundary_out
        return traced

    def _function(self, stage: int, *, train: bool, names: list[str] | None) -> StageFunction:
        layers = [self.layers[i] for i in self.cuts[stage]]
        is_first, is_last = stage == 0, stage == self.plan.num_stages - 1

        def run(params: Any, state: Any, activation: Any, batch: Any, randomness: Any) -> tuple[Any, Any]:
            value = batch[self.input] if is_first else activation
            for layer in layers:
                try:
                    value, after = layer(params, state, value, batch, Randomness(*randomness), train=train)
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


def _sum_and_weight(result: Any) -> tuple[jax.Array, jax.Array]:
    if not isinstance(result, tuple | list) or len(result) != 2 or any(np.shape(v) for v in result):
        shapes = jax.tree.map(np.shape, result)
        raise ValueError(
            "A loss must return two scalars: the sum of the losses over the microbatch, and their weight (how many "
            f"there are). Got {shapes}. Write e.g. `return losses.sum(), losses.size`."
        )
    return result[0], result[1]
