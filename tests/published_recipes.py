"""A recipe whose model is in the folder of weights that `--init-from` names, with data that need no tokenizer."""

from meshpipe.config import Config
from meshpipe.data import TextFilesConfig
from meshpipe.mesh import MeshConfig
from meshpipe.pipeline.config import PipelineConfig
from meshpipe.weights.published_model import PublishedModel


def pipeline() -> Config:
    """Two stages."""
    return Config(
        model=PublishedModel(),
        data=TextFilesConfig(sequence_length=16),
        mesh=MeshConfig(pipeline=2),
        pipeline=PipelineConfig(num_microbatches=2),
        steps=2,
        batch_size=4,
        eval_batches=0,
    )
