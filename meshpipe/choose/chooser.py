"""Decides what a config leaves open: how layers are cut into stages, and the plan that is fastest for them."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from functools import cached_property
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from meshpipe.choose.counted import count_layers, seconds_to_measure, why_not_measured
from meshpipe.choose.memory import ONE_UNIT_EACH, stage_memory
from meshpipe.choose.profile import operations_of_layers, profile_layers, setting_of
from meshpipe.choose.remat import settle_remat
from meshpipe.choose.waiting import settle_waiting
from meshpipe.errors import ArgumentError
from meshpipe.layers.arguments import check_layout, check_task
from meshpipe.layers.choice import Choice
from meshpipe.layers.stage_wiring import cut_wiring
from meshpipe.layers.staged_model import StagedModel
from meshpipe.layers.task import Task
from meshpipe.mesh import MeshConfig, make_mesh, submeshes
from meshpipe.phases import each
from meshpipe.pipeline.config import PipelineConfig, parse_bytes
from meshpipe.plan.graph import Graph
from meshpipe.plan.layer_costs import ModelCosts
from meshpipe.plan.partition import partition, partition_by_cost
from meshpipe.plan.plan import Action, Op, Plan
from meshpipe.plan.schedules import gpipe, loop, make_plan, zigzag
from meshpipe.plan.search.auto import NothingFits, Profile, auto_plan, shortest_named
from meshpipe.plan.simulate import Timeline
from meshpipe.plan.validate import validate
from meshpipe.stage.target import Target

MAX_STAGES_PER_RANK = 4
"""The most stages per rank that `auto` tries, if no number is given."""

NEARLY = 0.005
"""A step that is longer than the shortest by at most this share counts as equally short."""

TRIES = 4
"""How many plans to try under a memory limit, each with less space than the one before, if that needed too much."""

Cuts = tuple[range, ...]


@dataclass(frozen=True)
class Chooser:
    """A task and its layout, as `Trainer` takes them; `choose` makes the model, with its cut and plan.

    Nothing is measured unless the config asks for it: `partition="measured"` or `schedule="auto"`, and no `costs`.
    """

    task: Task
    transformation: optax.GradientTransformation
    _: KW_ONLY
    mesh: Mesh
    config: PipelineConfig
    target: Target | None = None
    """The platform that programs are written for; None is that of the mesh."""
    measure_on: Mesh | None = None
    """Where layers are measured, in place of the mesh: on its first rank, and transfers to its second if it has one."""
    count_because: str | None = None
    """Why costs are counted in the traced programs instead of measured; None measures, unless that is impossible."""

    def __post_init__(self) -> None:
        check_task(self.task)
        check_layout(self.mesh, self.config, self.transformation)

    def choose(self, costs: ModelCosts | None = None) -> StagedModel:
        """The model, ready to be compiled. `costs` are taken in place of measuring or reading them.

        Raises `ValueError` when layers, batch, mesh and config do not fit together, no plan keeps to the memory limit,
        or the costs are those of other layers.
        """
        model = self._laid_out(costs)
        settle_waiting(model, self.transformation)
        settle_remat(model, self.transformation)
        return model

    def _laid_out(self, costs: ModelCosts | None) -> StagedModel:
        config = self.config
        if costs is None and not config.needs_costs and config.partition != "cost":
            return self._model(named_choice(config, self._num_ranks, len(self.task.layers)))
        plan = None if config.schedule == "auto" else training_plan(config, self._num_ranks)
        candidates = [plan.stage_ranks] if plan else list(self._placements())
        if config.partition != "cost" and config.partition != "measured":
            for stage_ranks in candidates:
                partition(len(self.task.layers), len(stage_ranks), config.boundaries)  # before anything is measured
        elif len(self.task.layers) < len(candidates[0]):
            partition(len(self.task.layers), len(candidates[0]))
        if costs is not None or config.needs_costs:
            costs = self._checked(costs)
        if plan is not None:
            return self._model(Choice(plan, self._cuts(plan.stage_ranks, costs, Op.BACKWARD in _ops(plan)), costs))
        assert costs is not None
        cuts = dict.fromkeys(self._cuts(stage_ranks, costs) for stage_ranks in candidates)
        return self._model(self._fastest(list(cuts), costs))

    def before_and_after(self, costs: ModelCosts) -> tuple[StagedModel, StagedModel]:
        """The model cut as the config says, or evenly where it leaves that to costs, and cut by these costs."""
        asked = self.config.partition
        before = replace(self.config, partition="even" if asked == "measured" else asked)
        after = replace(self.config, partition="measured")
        return replace(self, config=before).choose(costs), replace(self, config=after).choose(costs)

    def measure(self) -> ModelCosts:
        """The costs of every layer, measured now; takes the time of compiling each kind of layer once.

        Where the layers do not fit into the memory, or would take very long to measure, their costs are counted.
        """
        mesh = self.mesh if self.measure_on is None else self.measure_on
        ranks = submeshes(mesh)
        model = self.layer_by_layer(mesh)
        traced = model.trace()
        about = seconds_to_measure(model, traced)
        why = self.count_because or why_not_measured(model, traced, about)
        if why is not None:
            return count_layers(model, traced, why, moves=self._num_ranks > 1)
        return profile_layers(model, self.task.batch, ranks[1] if len(ranks) > 1 else None, traced, about)

    @property
    def _num_ranks(self) -> int:
        return len(submeshes(self.mesh))

    def _model(self, choice: Choice, **changes: Any) -> StagedModel:
        arguments: dict[str, Any] = {"mesh": self.mesh, "config": self.config, "choice": choice, "target": self.target}
        return StagedModel(self.task, **(arguments | changes))

    def layer_by_layer(self, mesh: Mesh, cuts: Sequence[range] | None = None) -> StagedModel:
        """A model whose stages are single layers, or those of the cuts, all on the first rank of the mesh."""
        num_layers = len(self.task.layers)
        stages = partition(num_layers, num_layers) if cuts is None else tuple(cuts)
        plan = gpipe(1, self.config.num_microbatches, len(stages))
        first = Mesh(mesh.devices[:1], mesh.axis_names, axis_types=mesh.axis_types)
        return self._model(Choice(plan, stages, None), mesh=first, config=self._with_one_remat("none"))

    def _with_one_remat(self, of_several: str) -> PipelineConfig:
        """The config with one rematerialisation for all stages: `full` for `auto`, which stores the least."""
        text = self.config.remat
        names = {text} if "=" in text else set(text.split(","))
        (name,) = names if len(names) == 1 else (of_several,)
        return replace(
            self.config,
            remat="full" if name == "auto" else name,
            schedule="gpipe",
            memory_limit=None,
            costs=None,
            partition="even",
        )

    @cached_property
    def _probe(self) -> StagedModel:
        return self.layer_by_layer(self.mesh)

    @cached_property
    def _operations(self) -> list[float]:
        return operations_of_layers(self._probe)

    def _checked(self, costs: ModelCosts | None) -> ModelCosts:
        """The costs that are given, or read, or measured, in this order."""
        file = self.config.costs
        if costs is None:
            costs = self.measure() if file is None else ModelCosts.load(file)
        costs.check([layer.class_name for layer in self._probe.layers], setting_of(self._probe))
        return costs

    def _cuts(self, stage_ranks: Sequence[int], costs: ModelCosts | None, whole_backward: bool = True) -> Cuts:
        if self.config.partition == "cost":
            return partition_by_cost(self._operations, stage_ranks)
        if self.config.partition == "measured":
            assert costs is not None
            return partition_by_cost([layer.total(whole_backward) for layer in costs.layers], stage_ranks)
        return partition(len(self.task.layers), len(stage_ranks), self.config.boundaries)

    def _placements(self) -> Iterator[tuple[int, ...]]:
        """The placements of stages that `auto` may use, for each number of stages per rank: cyclic, and to and fro."""
        ranks, given, boundaries = self._num_ranks, self.config.stages_per_rank, self.config.boundaries
        if given is None and boundaries is not None:
            given = max(1, (len(boundaries) + 1) // ranks)
        most = max(1, min(MAX_STAGES_PER_RANK, len(self.task.layers) // ranks))
        for number in range(1, most + 1) if given is None else (given,):
            yield from dict.fromkeys((loop(ranks, number), zigzag(ranks, number)))

    def _fastest(self, options: Sequence[Cuts], costs: ModelCosts) -> Choice:
        """The cut and the plan with the shortest step in simulation.

        Fewer stages are preferred if the step is hardly longer and no named schedule is faster: every further stage
        costs host time and cache misses that the simulation does not know.
        """
        limit = None if self.config.memory_limit is None else parse_bytes(self.config.memory_limit)
        found: list[tuple[float, Choice]] = []
        errors: list[NothingFits] = []
        named = math.inf
        for cuts in each("Searching for the fastest plan,", "cut", options):
            times = costs.of_stages(cuts)
            # Of the two that store least, `full` is better for many live microbatches, and `layer` for large stages.
            remats = ("full", "layer") if self.config.remat == "auto" else (self.config.remat,)
            for remat in remats if limit is not None else remats[:1]:
                memory = () if limit is None else self._memory(cuts, remat)
                profiles = {len(cuts) // self._num_ranks: Profile(times, memory, self._graph(cuts))}
                try:
                    plan = self._plan_within(limit, profiles)
                except NothingFits as error:
                    errors.append(error)
                    continue
                found.append((Timeline.of(plan, times).makespan, Choice(plan, cuts, costs)))
                named = min(named, shortest_named(self._num_ranks, self.config.num_microbatches, profiles, limit))
                break
        if not found:
            raise min(errors, key=lambda error: error.least)
        shortest = min(makespan for makespan, _ in found)
        longest = max(shortest, min(shortest * (1 + NEARLY), named)) * (1 + 1e-9)
        return next(choice for makespan, choice in found if makespan <= longest)  # the first has the fewest stages

    def _plan_within(self, limit: int | None, profiles: Mapping[int, Profile]) -> Plan:
        """The fastest plan that keeps to the limit, both by the times of its actions and in the order of dispatch.

        Raises `NothingFits` when there is none, or none is found in a few tries.
        """
        allowed, ranks = limit, self._num_ranks
        for _ in range(TRIES):
            plan = auto_plan(ranks, self.config.num_microbatches, profiles, allowed)
            if limit is None or allowed is None:
                return plan
            memory = profiles[plan.num_stages // ranks].memory
            excess = max(Timeline.of(plan, ONE_UNIT_EACH, memory).peak_bytes) - limit
            if excess <= 0:
                return plan
            allowed -= math.ceil(excess)
        assert limit is not None
        raise NothingFits(
            f"Values in transit between ranks must fit too. Got a memory limit of {limit:,} bytes, for which no plan "
            f"was found. Raise it by {math.ceil(excess):,} bytes.",
            limit + excess,
        )

    def _graph(self, cuts: Cuts) -> Graph:
        """What stages of these layers read of each other, and which are trained."""
        trained = [bool(layer.params) for layer in self._probe.layers]
        return cut_wiring(self._probe.wiring, cuts, [any(trained[layer] for layer in cut) for cut in cuts]).graph

    def _memory(self, cuts: Cuts, remat: str) -> Any:
        """What each stage stores, also with a split backward."""
        stages_per_rank = len(cuts) // self._num_ranks
        plan = split_backwards(gpipe(self._num_ranks, self.config.num_microbatches, stages_per_rank))
        config = replace(self.config, remat=remat)
        return stage_memory(self._model(Choice(plan, cuts, None), config=config), self.transformation)


def training_plan(config: PipelineConfig, num_ranks: int) -> Plan:
    """The plan of a named schedule or of a plan file.

    Raises `ValueError` when there is none, it breaks a rule, or it trains nothing.
    """
    plan = make_plan(config.schedule, num_ranks, config.num_microbatches, stages_per_rank=config.stages_per_rank)
    validate(plan)
    if plan.forward_only:
        raise ValueError(
            f"Training needs a schedule with backwards. Got {config.schedule!r}, which has none. Choose e.g. 1f1b."
        )
    return plan


def named_choice(config: PipelineConfig, num_ranks: int, num_layers: int) -> Choice:
    """The plan and the cut of a config that needs no costs."""
    plan = training_plan(config, num_ranks)
    return Choice(plan, partition(num_layers, plan.num_stages, config.boundaries), None)


def check_costs(config: PipelineConfig) -> None:
    """Raises `ValueError` when several processes would each measure."""
    if config.needs_costs and config.costs is None:
        raise ArgumentError(
            "Processes that each measured layers would choose different plans. Got schedule auto or partition "
            "measured without costs. Write them once by `meshpipe plan RECIPE --profile --save-costs FILE.json`, and "
            "pass that file as `costs` to all."
        )


def measuring_mesh(sizes: MeshConfig) -> Mesh:
    """A rank of JAX's default devices, or two where the mesh has as many and the devices suffice.

    Raises `ValueError` when there are too few for one.
    """
    suffice = len(jax.devices()) >= 2 * sizes.data * sizes.tensor
    return make_mesh(2 if sizes.pipeline > 1 and suffice else 1, sizes.data, sizes.tensor)


def _ops(plan: Plan) -> set[Op]:
    return {action.op for action in plan.actions}


def split_backwards(plan: Plan) -> Plan:
    """The plan with every backward split in two parts, one directly after the other."""

    def parts(action: Action) -> tuple[Action, ...]:
        if action.op is not Op.BACKWARD:
            return (action,)
        return replace(action, op=Op.BACKWARD_INPUT), replace(action, op=Op.BACKWARD_WEIGHT)

    return replace(plan, orders=tuple(tuple(part for a in order for part in parts(a)) for order in plan.orders))
