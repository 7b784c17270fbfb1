"""Tunes published weights on your own tokens; one function per layout.

`--init-from FOLDER` names the weights, a folder with config.json and files of safetensors, and gives the model;
`--data.path FOLDER` names what `meshpipe data prepare` made of your text with the tokenizer of that folder.
"""

from dataclasses import replace

from meshpipe.adapters.config import LoraConfig
from meshpipe.config import Config
from meshpipe.data import PreparedConfig
from meshpipe.mesh import MeshConfig
from meshpipe.optimizer.config import OptimizerConfig
from meshpipe.pipeline.config import PipelineConfig
from meshpipe.weights.published_model import PublishedModel


def full() -> Config:
    """One device: trains all parameters."""
    return Config(
        model=PublishedModel(),
        data=PreparedConfig(path="prepared"),
        optimizer=OptimizerConfig(
            learning_rate=1e-5, warmup_steps=20, decay="cosine", weight_decay=0.01, clip_norm=1.0
        ),
        steps=200,
        batch_size=16,
    )


def full_pipeline() -> Config:
    """4 devices, each with a quarter of the layers: trains all parameters."""
    return replace(full(), mesh=MeshConfig(pipeline=4), pipeline=PipelineConfig(num_microbatches=16, remat="layer"))


def lora() -> Config:
    """One device: trains adapters of rank 16 beside weights that stay as they are."""
    base = full()
    return replace(
        base,
        lora=LoraConfig(rank=16, alpha=32.0),
        optimizer=replace(base.optimizer, learning_rate=2e-4, weight_decay=0.0),
    )


def lora_pipeline() -> Config:
    """4 devices, each with a quarter of the layers: trains adapters of rank 16."""
    return replace(lora(), mesh=MeshConfig(pipeline=4), pipeline=PipelineConfig(num_microbatches=16, remat="layer"))
