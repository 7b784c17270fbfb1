"""Builds the trainer and the chooser of a recipe's config."""

import jax
from jax.sharding import Mesh

from meshpipe.choose.chooser import Chooser
from meshpipe.config import Config
from meshpipe.layers.paths import by_path
from meshpipe.layers.staged_model import StagedModel
from meshpipe.optimizer.state import state_shapes
from meshpipe.trainer import Trainer
from meshpipe.training.setup import Check
from meshpipe.training.state import StartingState, StateTree


def make_trainer(config: Config, check: Check | None = None) -> Trainer:
    """The compiled trainer of a recipe. `check` is called with its model before compilation, and may return what the
    trainer starts from.

    Raises `ValueError` when the parts of the config do not fit together.
    """

    def check_all(model: StagedModel) -> StartingState | None:
        check_groups_of(config, model)
        return None if check is None else check(model)

    return Trainer.of(
        config.task(),
        config.optimizer.build(config.steps),
        mesh=config.mesh.build(),
        pipeline=config.pipeline,
        seed=config.seed,
        clip_norm=config.optimizer.clip_norm,
        compile_cache=config.compile_cache,
        check_memory=not config.force,
        check=check_all,
    )


def make_chooser(config: Config, *, mesh: Mesh | None = None, measure_on: Mesh | None = None) -> Chooser:
    """The chooser of a recipe's layout, on the given mesh or the one in its config. Allocates nothing.

    Raises `ValueError` when the devices are too few.
    """
    return Chooser(
        config.task(),
        config.optimizer.build(config.steps),
        mesh=config.mesh.build() if mesh is None else mesh,
        config=config.pipeline,
        measure_on=measure_on,
        count_because=_why_counted(config),
    )


def check_groups_of(config: Config, model: StagedModel) -> None:
    """Raises `ValueError` for a group of the optimizer that gets none of the parameters that are trained."""
    config.optimizer.check(path for stage in model.parameters for path in stage.owned)


def _why_counted(config: Config) -> str | None:
    if config.for_accelerators and jax.default_backend() == "cpu" and not config.force:
        return "this recipe is for accelerators, and this machine has none"
    return None


def saved_shapes(config: Config, model: StagedModel, *, frozen: bool = True) -> list[StateTree]:
    """What `Trainer.abstract_state_tree` will be, known before anything is compiled."""
    transformation = config.optimizer.build(config.steps)
    return [
        {
            "params": stage.all_params if frozen else dict(stage.params),
            "state": stage.own_state,
            "optimizer": by_path(state_shapes(transformation, stage), stage.params),
        }
        for stage in model.parameters
    ]
