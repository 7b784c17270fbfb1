"""Layers and a loss cut into stages as a config names it, without an optimizer."""

from typing import Any

from jax.sharding import Mesh

from meshpipe import PipelineConfig
from meshpipe.choose.chooser import named_choice
from meshpipe.layers.staged_model import StagedModel
from meshpipe.layers.task import Task
from meshpipe.mesh import submeshes


def staged(task: Task, mesh: Mesh, config: PipelineConfig, **changes: Any) -> StagedModel:
    choice = named_choice(config, len(submeshes(mesh)), len(task.layers))
    return StagedModel(task, mesh=mesh, config=config, choice=choice, **changes)
