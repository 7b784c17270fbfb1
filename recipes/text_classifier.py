"""Which of ten Python packages does a piece of source text come from? One base, one function per layout.

Every layout trains the same model on the same data, batches and order of examples. Layouts with a pipeline have 4
microbatches per stage, a rule of thumb that keeps four stages busy 84 % of the time.
"""

from dataclasses import replace

from meshpipe.config import Config
from meshpipe.data import PackageWindowsConfig
from meshpipe.mesh import MeshConfig
from meshpipe.models import TextClassifierConfig
from meshpipe.optimizer.config import OptimizerConfig
from meshpipe.pipeline.config import PipelineConfig


def single() -> Config:
    """One device: the baseline for every other layout."""
    return Config(
        model=TextClassifierConfig.small(),
        data=PackageWindowsConfig(sequence_length=128),
        optimizer=OptimizerConfig(learning_rate=4e-3, warmup_steps=5, decay="cosine", weight_decay=0.01, clip_norm=1.0),
        steps=60,
        batch_size=64,
    )


def data() -> Config:
    """2 devices, each with the whole model and half of every batch."""
    return replace(single(), mesh=MeshConfig(data=2))


def pipeline() -> Config:
    """4 devices, each with one layer: embedding, block, block, head."""
    return replace(single(), mesh=MeshConfig(pipeline=4), pipeline=PipelineConfig(num_microbatches=16))


def pipeline_data() -> Config:
    """8 devices: four stages, each on 2 devices that share its microbatches."""
    return replace(pipeline(), mesh=MeshConfig(pipeline=4, data=2))


def pipeline_tensor() -> Config:
    """8 devices: four stages, each on 2 devices that share its heads and hidden units."""
    return replace(pipeline(), mesh=MeshConfig(pipeline=4, tensor=2))


def pipeline_data_tensor() -> Config:
    """8 devices: two stages of two layers, each on 2 x 2 devices."""
    return replace(
        pipeline(), mesh=MeshConfig(pipeline=2, data=2, tensor=2), pipeline=PipelineConfig(num_microbatches=8)
    )


def full_size() -> Config:
    """4 devices, the model at its full size (d_model 256, 8 heads): seconds a step on a CPU."""
    base = pipeline()
    return replace(base, model=TextClassifierConfig(), optimizer=replace(base.optimizer, learning_rate=7e-4), steps=100)
