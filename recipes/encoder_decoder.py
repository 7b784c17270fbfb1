"""Write a piece of source text backwards: an encoder reads it, a decoder writes it; one function per layout.

The encoder's output has the name `memory`, and goes straight to every stage whose decoder blocks attend to it. The
decoder begins with the batch field `inputs`.
"""

from dataclasses import replace

from meshpipe.config import Config
from meshpipe.data import ReversedTextConfig
from meshpipe.mesh import MeshConfig
from meshpipe.models import EncoderDecoderConfig
from meshpipe.optimizer.config import OptimizerConfig
from meshpipe.pipeline.config import PipelineConfig


def single() -> Config:
    """One device: the baseline for every other layout."""
    return Config(
        model=EncoderDecoderConfig(),
        data=ReversedTextConfig(),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=20, decay="cosine", clip_norm=1.0),
        steps=180,
        batch_size=64,
    )


def data() -> Config:
    """2 devices, each with the whole model and half of every batch."""
    return replace(single(), mesh=MeshConfig(data=2))


def pipeline() -> Config:
    """4 devices: the first two stages have the encoder, the others decoder blocks that read its output."""
    return replace(single(), mesh=MeshConfig(pipeline=4), pipeline=PipelineConfig(num_microbatches=16))


def pipeline_data() -> Config:
    """8 devices: four stages, each on 2 devices that share its microbatches."""
    return replace(pipeline(), mesh=MeshConfig(pipeline=4, data=2))


def pipeline_tensor() -> Config:
    """8 devices: four stages, each on 2 devices that share its heads, hidden units and vocabulary."""
    return replace(pipeline(), mesh=MeshConfig(pipeline=4, tensor=2))
