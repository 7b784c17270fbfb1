"""A byte-level language model in the shape of Llama, on Python source or your own text; one function per layout.

Every layout trains the same model on the same data, batches and order of examples. Layouts with a pipeline have 4
microbatches per stage, a rule of thumb that keeps four stages busy 84 % of the time.
"""

from dataclasses import replace

from meshpipe.adapters.config import LoraConfig
from meshpipe.config import Config
from meshpipe.data import TextFilesConfig
from meshpipe.mesh import MeshConfig
from meshpipe.models import LanguageModelConfig
from meshpipe.optimizer.config import OptimizerConfig
from meshpipe.pipeline.config import PipelineConfig


def single() -> Config:
    """One device: the baseline for every other layout."""
    return Config(
        model=LanguageModelConfig.small(),
        data=TextFilesConfig(sequence_length=64),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=5, decay="cosine", weight_decay=0.01, clip_norm=1.0),
        steps=60,
        batch_size=32,
    )


def data() -> Config:
    """2 devices, each with the whole model and half of every batch."""
    return replace(single(), mesh=MeshConfig(data=2))


def pipeline() -> Config:
    """4 devices, each with two of the eight layers."""
    return replace(single(), mesh=MeshConfig(pipeline=4), pipeline=PipelineConfig(num_microbatches=16))


def pipeline_data() -> Config:
    """8 devices: four stages, each on 2 devices that share its microbatches."""
    return replace(pipeline(), mesh=MeshConfig(pipeline=4, data=2))


def pipeline_tensor() -> Config:
    """8 devices: four stages, each on 2 devices that share its heads, hidden units and vocabulary."""
    return replace(pipeline(), mesh=MeshConfig(pipeline=4, tensor=2))


def pipeline_data_tensor() -> Config:
    """8 devices: two stages of four layers, each on 2 x 2 devices."""
    return replace(
        pipeline(), mesh=MeshConfig(pipeline=2, data=2, tensor=2), pipeline=PipelineConfig(num_microbatches=8)
    )


def debug() -> Config:
    """2 devices and the smallest model with every part, for quick trials: seconds on a CPU."""
    return replace(
        single(),
        model=LanguageModelConfig.debug(),
        mesh=MeshConfig(pipeline=2),
        pipeline=PipelineConfig(num_microbatches=8),
        steps=20,
    )


def lora() -> Config:
    """4 devices, as `pipeline`: trains adapters of rank 8 on a frozen model; give it trained weights by --init-from."""
    return replace(
        pipeline(),
        lora=LoraConfig(rank=8),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=5, decay="cosine", clip_norm=1.0),
    )


def llama_7b() -> Config:
    """8 accelerators of 80 GB: Llama 2 7B, four stages on 2 devices each; see it with `meshpipe plan`.

    A batch is 32 sequences of 4096 tokens. Llama's own is 4 million tokens: that is 32 times this layout side by side,
    `--mesh.data 32 --batch-size 1024`.
    """
    return Config(
        model=LanguageModelConfig.llama_7b(),
        data=TextFilesConfig(sequence_length=4096),
        mesh=MeshConfig(pipeline=4, tensor=2),
        pipeline=PipelineConfig(num_microbatches=32, remat="layer"),
        optimizer=OptimizerConfig(
            learning_rate=3e-4, warmup_steps=2000, decay="cosine", weight_decay=0.1, clip_norm=1.0
        ),
        steps=500_000,
        batch_size=32,
        for_accelerators=True,
    )


def llama_70b() -> Config:
    """64 accelerators of 80 GB: Llama 2 70B, eight stages on 8 devices each; see it with `meshpipe plan`.

    A batch is 64 sequences of 4096 tokens; `--mesh.data 16 --batch-size 1024` makes it Llama's 4 million tokens.
    """
    base = llama_7b()
    return replace(
        base,
        model=LanguageModelConfig.llama_70b(),
        mesh=MeshConfig(pipeline=8, tensor=8),
        pipeline=PipelineConfig(num_microbatches=64, remat="layer"),
        optimizer=replace(base.optimizer, learning_rate=1.5e-4),
        batch_size=64,
    )
