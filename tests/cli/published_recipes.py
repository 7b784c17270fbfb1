"""Recipes of the model in models/golden/llama3, on text."""

from dataclasses import replace

import golden

from meshpipe.config import Config
from meshpipe.data import TextFilesConfig
from meshpipe.mesh import MeshConfig
from meshpipe.optimizer.config import OptimizerConfig
from meshpipe.pipeline.config import PipelineConfig


def single() -> Config:
    return Config(
        model=golden.CONFIGS["llama3"],
        data=TextFilesConfig(path="text.txt", sequence_length=16),
        optimizer=OptimizerConfig(optimizer="sgd"),
        batch_size=4,
    )


def pipeline() -> Config:
    return replace(single(), mesh=MeshConfig(pipeline=2), pipeline=PipelineConfig(num_microbatches=2))
