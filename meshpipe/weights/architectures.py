"""The architectures whose weights are read and written, and the tables of their tensors."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from meshpipe.errors import ArgumentError, errors_name_flags, is_number
from meshpipe.models.gpt2 import GPT2Config
from meshpipe.models.language_model import LanguageModelConfig
from meshpipe.models.model import ModelConfig
from meshpipe.weights import decoder_config as decoder
from meshpipe.weights.decoder_table import decoder_table
from meshpipe.weights.entry import Entry, expanded
from meshpipe.weights.errors import WeightsError
from meshpipe.weights.fields import Fields
from meshpipe.weights.gpt2 import PREFIX, gpt2_table, read_gpt2, write_gpt2
from meshpipe.weights.quantised import check_not_quantised

READERS: Mapping[str, Callable[[Fields], ModelConfig]] = {
    "llama": decoder.read_llama,
    "mistral": decoder.read_mistral,
    "qwen2": decoder.read_qwen2,
    "qwen3": decoder.read_qwen3,
    "gemma2": decoder.read_gemma2,
    "gemma3_text": decoder.read_gemma3,
    "gpt2": read_gpt2,
}
"""By `model_type` of config.json."""
NOT_COMPUTED: Mapping[str, str] = {"dtype": "float32", "param_dtype": "float32", "attention": "auto"}
"""Fields of a model that say how it is computed and kept, and nothing of what."""


DROPOUTS = ("attention_dropout", "hidden_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop")
"""Fields of config.json."""


@dataclass(frozen=True)
class Table:
    """The tensors of a model, and the leaves that they are."""

    entries: tuple[Entry, ...]
    """One for each leaf that has its numbers to itself."""
    tied: Mapping[str, str]
    """Leaves that have those of another one, which owns them."""
    prefix: str = ""
    """How the names of tensors begin, which some files leave out."""
    unused: tuple[str, ...] = ()
    """Ends of the names of tensors that files may have and no model needs."""


def table_of(model: ModelConfig) -> Table:
    """Raises `WeightsError` for a model of which nothing is published."""
    tied = {path: group[0] for group in model.tied() for path in group[1:]}
    if type(model) is LanguageModelConfig:
        entries = tuple(expanded(decoder_table(model), model.num_blocks))
        return Table(entries, tied, "model.", (".rotary_emb.inv_freq",))
    if type(model) is GPT2Config:
        entries = tuple(expanded(gpt2_table(model), model.num_blocks))
        return Table(entries, tied, PREFIX, (".attn.bias", ".attn.masked_bias"))
    raise WeightsError(
        "Weights are exchanged for models of LanguageModelConfig and GPT2Config, which others publish as well. "
        f"Got {type(model).__name__}. Use meshpipe's own checkpoints for it."
    )


def read_config(fields: Fields) -> ModelConfig:
    """The model that a config.json describes. Raises `WeightsError` where meshpipe computes none like it."""
    kind = fields.values.get("model_type")
    if not isinstance(kind, str) or kind not in READERS:
        raise WeightsError(
            f"`model_type` of {fields.place} must be one of {', '.join(READERS)}. Got {kind!r:.60}. "
            "A model of another architecture needs layers of its own."
        )
    check_not_quantised(fields)
    try:
        with errors_name_flags(False):  # no flag sets what a file says
            return READERS[kind](fields)
    except ArgumentError as error:
        raise WeightsError(f"{fields.place} must describe a model that can be: {error}") from None


def dropouts(fields: Fields) -> dict[str, float]:
    """The rates of dropout that a config.json has for training, which no model has here; those above 0."""
    rates = {name: fields.values.get(name) for name in DROPOUTS}
    return {name: float(rate) for name, rate in rates.items() if is_number(rate) and rate}


def write_config(model: ModelConfig) -> dict[str, Any]:
    """The fields of config.json. Raises `WeightsError` for a model that no architecture of transformers computes."""
    table_of(model)
    values = write_gpt2(model) if isinstance(model, GPT2Config) else decoder.write_decoder(_decoder(model))
    found = read_config(Fields(values, "the config.json to be written"))
    wrong = differences(model, found)
    if wrong:
        raise WeightsError(
            "A model must be one of the architectures of transformers to be exported. The nearest is "
            f"{values['model_type']}, which differs: {'; '.join(wrong)}. Keep it as a checkpoint of meshpipe."
        )
    return values


def _decoder(model: ModelConfig) -> LanguageModelConfig:
    assert isinstance(model, LanguageModelConfig)
    return model


def differences(model: ModelConfig, other: ModelConfig) -> Sequence[str]:
    """What two models compute differently, field by field, in words."""
    if type(model) is not type(other):
        return [f"{type(model).__name__} is not {type(other).__name__}"]
    ours, theirs = (_flat(_computed(config)) for config in (model, other))
    return [
        f"{name} is {ours.get(name)}, not {theirs.get(name)}"
        for name in sorted(ours.keys() | theirs.keys())
        if ours.get(name) != theirs.get(name)
    ]


def _computed(model: ModelConfig) -> ModelConfig:
    """A model with what does not change its numbers as it is by default, and other names of one thing as one."""
    known = {name: value for name, value in NOT_COMPUTED.items() if hasattr(model, name)}
    changes: dict[str, Any] = dict(known)
    if isinstance(model, LanguageModelConfig):
        size = model.features_of_a_head
        if size * model.num_heads == model.d_model:
            changes["head_dim"] = None
        if model.query_scalar == size:
            changes["query_scalar"] = None
        if not any(model.has_window(block) for block in range(model.num_blocks)):
            changes["window"] = type(model.window)()
        elif model.window.global_every is not None and model.window.global_every > model.num_blocks:
            changes["window"] = replace(model.window, global_every=None)
    elif isinstance(model, GPT2Config) and model.d_hidden == 4 * model.d_model:
        changes["d_hidden"] = None
    return replace(model, **changes)


def _flat(config: Any, name: str = "") -> dict[str, Any]:
    if not hasattr(config, "__dataclass_fields__"):
        return {name: config}
    found: dict[str, Any] = {}
    for field in config.__dataclass_fields__:
        found |= _flat(getattr(config, field), f"{name}.{field}" if name else field)
    return found
