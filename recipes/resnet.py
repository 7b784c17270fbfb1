"""Which digit is on an image of 8 x 8 pixels? A residual network with batch normalisation; one function per layout.

Batch normalisation sees one microbatch at a time, so all layouts have 4 microbatches of 32 images, also on one device:
they then train the same model. The data needs scikit-learn: `pip install 'meshpipe[digits]'`.
"""

from dataclasses import replace

from meshpipe.config import Config
from meshpipe.data import DigitsConfig
from meshpipe.mesh import MeshConfig
from meshpipe.models import ResNetConfig
from meshpipe.optimizer.config import OptimizerConfig
from meshpipe.pipeline.config import PipelineConfig


def single() -> Config:
    """One device: the baseline for every other layout."""
    return Config(
        model=ResNetConfig(),
        data=DigitsConfig(),
        pipeline=PipelineConfig(num_microbatches=4),
        optimizer=OptimizerConfig(learning_rate=4e-3, warmup_steps=5, decay="cosine", weight_decay=0.01),
        steps=100,
        batch_size=128,
    )


def data() -> Config:
    """2 devices, each with the whole model and half of every batch; statistics are those of both halves."""
    return replace(single(), mesh=MeshConfig(data=2))


def pipeline() -> Config:
    """4 devices, each with two of the eight layers."""
    return replace(single(), mesh=MeshConfig(pipeline=4))


def pipeline_data() -> Config:
    """8 devices: four stages, each on 2 devices that share its microbatches."""
    return replace(single(), mesh=MeshConfig(pipeline=4, data=2))


def pipeline_tensor() -> Config:
    """8 devices: four stages, each on 2 devices that share the channels inside of its blocks."""
    return replace(single(), mesh=MeshConfig(pipeline=4, tensor=2))
