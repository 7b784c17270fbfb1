"""How long a text a published model is for."""

from pathlib import Path

from meshpipe.models.model import ModelConfig
from meshpipe.models.rope import RopeScaling
from meshpipe.weights.fields import Fields
from meshpipe.weights.folder import CONFIG
from meshpipe.weights.multimodal import text_fields


def longest_text(folder: Path | None, model: ModelConfig) -> int | None:
    """The most positions that a model is for by the config.json in a folder; None where that does not say.

    Models with rotary positions compute longer texts as well, which they have not been trained on.
    """
    if folder is None or not (folder / CONFIG).is_file():
        return None
    most = text_fields(Fields.of_file(folder / CONFIG)).optional_size("max_position_embeddings")
    scaling = getattr(model, "rope_scaling", RopeScaling())
    if most is None or scaling.kind != "yarn":
        return most
    return max(most, int(scaling.factor * scaling.original_positions))  # some files have the positions before
