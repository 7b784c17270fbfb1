"""The work of a small language model, on which layouts are searched."""

import jax
import pytest

from meshpipe.advise.survey import survey
from meshpipe.advise.work import ModelWork
from meshpipe.config import Config
from meshpipe.data import TextFilesConfig
from meshpipe.models import LanguageModelConfig
from meshpipe.stage.target import ACCELERATOR


@pytest.fixture(scope="session")
def work() -> ModelWork:
    model = LanguageModelConfig(d_model=32, num_blocks=4, num_heads=4, num_kv_heads=2, d_hidden=64, dtype="bfloat16")
    config = Config(model=model, data=TextFilesConfig(sequence_length=32), batch_size=8)
    return survey(config, jax.devices(), ACCELERATOR)
