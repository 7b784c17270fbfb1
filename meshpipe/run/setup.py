"""A recipe's config made into what runs it."""

from collections.abc import Callable

from jax.sharding import Mesh

from meshpipe.choose.chooser import Chooser
from meshpipe.config import Config
from meshpipe.layers.paths import by_path
from meshpipe.layers.staged_model import StagedModel
from meshpipe.optimizer.state import state_shapes
from meshpipe.trainer import StateTree, Trainer


def make_trainer(config: Config, check: Callable[[StagedModel], None] | None = None) -> Trainer:
    """The trainer of a recipe, compiled, after `check` has seen its model.

    Raises `ValueError` when the parts of the config do not fit together.
    """
    return Trainer.of(
        config.task(),
        config.optimizer.build(config.steps),
        mesh=config.mesh.build(),
        pipeline=config.pipeline,
        seed=config.seed,
        clip_norm=config.optimizer.clip_norm,
        compile_cache=config.compile_cache,
        check=check,
    )


def make_chooser(config: Config, *, mesh: Mesh | None = None, measure_on: Mesh | None = None) -> Chooser:
    """What lays a recipe's model out, on the mesh that it asks for unless one is given; allocates nothing.

    Raises `ValueError` when the devices are too few.
    """
    return Chooser(
        config.task(),
        config.optimizer.build(config.steps),
        mesh=config.mesh.build() if mesh is None else mesh,
        config=config.pipeline,
        measure_on=measure_on,
    )


def saved_shapes(config: Config, model: StagedModel) -> list[StateTree]:
    """What `Trainer.abstract_state_tree` will be, known before anything is compiled."""
    transformation = config.optimizer.build(config.steps)
    return [
        {
            "params": dict(stage.params),
            "state": dict(stage.state),
            "optimizer": by_path(state_shapes(transformation, stage), stage.params),
        }
        for stage in model.parameters
    ]
