"""Folders of models that see as well: the config and the tensors of the model of text in them."""

from collections.abc import Mapping
from typing import Any

from meshpipe.weights.errors import WeightsError
from meshpipe.weights.fields import Fields

_TEXT = "text_config"
_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    # What the class of transformers fills in, which these files leave out.
    "gemma3": {
        "model_type": "gemma3_text",
        "architectures": ["Gemma3ForCausalLM"],
        "vocab_size": 262_208,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "sliding_window": 4096,
    },
}
"""By `model_type` of a model that sees."""
_KEPT = (
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "dtype",
    "torch_dtype",
    "quantization_config",
    "tie_word_embeddings",
    "transformers_version",
)
"""Fields of the whole model that go with the text model."""
_PREFIXES = {
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
    "model.language_model.": "model.",
}
_OTHERS = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")


def text_fields(fields: Fields) -> Fields:
    """The config of the model of text: the fields themselves, where the model has no other part."""
    defaults = _DEFAULTS.get(str(fields.values.get("model_type")))
    if defaults is None:
        return fields
    text = fields.nested(_TEXT)
    if text is None:
        raise WeightsError(f"{fields.place} must have `{_TEXT}`, as it is of a model that sees as well. It has none.")
    kept = {name: fields.values[name] for name in _KEPT if name in fields.values}
    return Fields({**defaults, **kept, **text.values}, text.place)


def text_name(name: str) -> str:
    """The name that a tensor has in the model of text."""
    for prefix, new in _PREFIXES.items():
        if name.startswith(prefix):
            return new + name.removeprefix(prefix)
    return name


def is_other(name: str) -> bool:
    """Whether a tensor is of the part that sees."""
    return name.startswith(_OTHERS)
