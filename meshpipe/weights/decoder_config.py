"""config.json of Llama and its relatives, read as the config of a language model and written from one."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from meshpipe.models.language_model import LanguageModelConfig, WindowConfig
from meshpipe.models.norms import NormConfig
from meshpipe.models.rope import RopeScaling
from meshpipe.weights.fields import Fields
from meshpipe.weights.rope_config import read_scaling, write_scaling

_LOCAL, _GLOBAL = "sliding_attention", "full_attention"


def read_llama(fields: Fields) -> LanguageModelConfig:
    fields.must_be("attention_bias", False)
    fields.must_be("mlp_bias", False)
    return _model(fields)


def read_mistral(fields: Fields) -> LanguageModelConfig:
    return replace(_model(fields), window=WindowConfig(size=fields.optional_size("sliding_window")))


def read_qwen2(fields: Fields) -> LanguageModelConfig:
    return replace(_model(fields), qkv_bias=True, window=_window_of_qwen(fields))


def read_qwen3(fields: Fields) -> LanguageModelConfig:
    fields.must_be("attention_bias", False)
    model = _model(fields, head_dim=128)
    return replace(model, norm=replace(model.norm, queries=True), window=_window_of_qwen(fields))


def read_gemma2(fields: Fields) -> LanguageModelConfig:
    every = None if fields.names("layer_types") is not None else 2
    return replace(
        _gemma(fields),
        attention_softcap=fields.optional_number("attn_logit_softcapping"),
        logit_softcap=fields.optional_number("final_logit_softcapping"),
        window=_window(fields, 4096, every),
    )


def read_gemma3(fields: Fields) -> LanguageModelConfig:
    fields.must_be("attn_logit_softcapping")
    fields.must_be("final_logit_softcapping")
    model = _gemma(fields, theta=1e6)
    window = _window(fields, 4096, fields.size("sliding_window_pattern", 6))
    local = _rope_of(fields, _LOCAL)
    theta = fields.number("rope_local_base_freq", 10_000.0) if local is None else local.number("rope_theta", 10_000.0)
    if local is not None:
        local.must_be("rope_type", "default")
    if window.size is not None:
        window = replace(window, rope_theta=theta)
    return replace(model, norm=replace(model.norm, queries=True), window=window)


def _model(fields: Fields, head_dim: int | None = None, **more: Any) -> LanguageModelConfig:
    """What all have in common. `head_dim` is that of a file that gives none."""
    fields.must_be("partial_rotary_factor", 1.0)
    width, heads = fields.size("hidden_size"), fields.size("num_attention_heads")
    given = fields.optional_size("head_dim") or head_dim
    theta, scaling = _rope(fields, more.pop("theta", 10_000.0))
    made: dict[str, Any] = {
        "d_model": width,
        "num_blocks": fields.blocks("num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": fields.size("num_key_value_heads", heads),
        "d_hidden": fields.size("intermediate_size"),
        "vocab_size": fields.size("vocab_size"),
        "head_dim": None if given is None or given * heads == width else given,
        "gate": fields.choice("hidden_act", {"silu": "silu"}, "silu") if "gate" not in more else None,
        "norm": NormConfig(epsilon=fields.number("rms_norm_eps", 1e-6)),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "tie_embedding": fields.flag("tie_word_embeddings", False),
    }
    return LanguageModelConfig(**made | more)


def _gemma(fields: Fields, theta: float = 10_000.0) -> LanguageModelConfig:
    fields.must_be("attention_bias", False)
    fields.must_be("use_bidirectional_attention", False)
    # Older files have two fields for it, of which transformers uses this one.
    fields.choice("hidden_activation", {"gelu_pytorch_tanh": "gelu"}, "gelu_pytorch_tanh")
    made = _model(
        fields,
        head_dim=256,
        theta=theta,
        gate="gelu",
        tie_embedding=fields.flag("tie_word_embeddings", True),
        scale_embedding=True,
        norm=NormConfig(epsilon=fields.number("rms_norm_eps", 1e-6), offset=True, branches=True),
    )
    scalar = fields.number("query_pre_attn_scalar", 256.0)
    return replace(made, query_scalar=None if scalar == made.features_of_a_head else scalar)


def _rope_of(fields: Fields, kind: str) -> Fields | None:
    """The rotary positions of a kind of block, in files that tell kinds apart."""
    parameters = fields.nested("rope_parameters")
    return None if parameters is None else parameters.nested(kind)


def _rope(fields: Fields, default: float) -> tuple[float, RopeScaling]:
    """Base and scaling, from the field of transformers 5 or from those of older versions."""
    parameters = _rope_of(fields, _GLOBAL) or fields.nested("rope_parameters")
    theta = (parameters or fields).number("rope_theta", fields.number("rope_theta", default))
    scaling = parameters or fields.nested("rope_scaling")
    return theta, RopeScaling() if scaling is None else read_scaling(scaling, fields)


def _window_of_qwen(fields: Fields) -> WindowConfig:
    if not fields.flag("use_sliding_window", False):
        return WindowConfig()
    if fields.names("layer_types") is not None or fields.values.get("max_window_layers") == 0:
        return _window(fields, 4096, None)
    if fields.size("max_window_layers", 28) < fields.size("num_hidden_layers"):
        raise fields.wrong("max_window_layers", "0 or at least the number of blocks")
    return WindowConfig()


def _window(fields: Fields, default: int, every: int | None) -> WindowConfig:
    """The window of the blocks that have one: by `layer_types`, or else all but every n-th."""
    kinds = fields.names("layer_types")
    blocks = fields.blocks("num_hidden_layers")
    if kinds is not None:
        every = kinds.index(_GLOBAL) + 1 if _GLOBAL in kinds else None
        expected = [_LOCAL if every is None or (i + 1) % every else _GLOBAL for i in range(blocks)]
        if list(kinds) != expected:
            raise fields.wrong("layer_types", f"a list in which every n-th of {blocks} is {_GLOBAL}, others {_LOCAL}")
        if every == 1:
            return WindowConfig()
    return WindowConfig(size=fields.size("sliding_window", default), global_every=every)


def write_decoder(model: LanguageModelConfig) -> dict[str, Any]:
    """The fields of config.json for a model, of the architecture that it is of."""
    kind = _kind(model)
    size = model.features_of_a_head
    made: dict[str, Any] = {
        "architectures": [_CLASSES[kind]],
        "model_type": kind,
        "hidden_size": model.d_model,
        "num_hidden_layers": model.num_blocks,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": size,
        "intermediate_size": model.d_hidden,
        "vocab_size": model.vocab_size,
        "rms_norm_eps": model.norm.epsilon,
        "rope_theta": model.rope_theta,
        "rope_scaling": write_scaling(model.rope_scaling),
        "tie_word_embeddings": model.tie_embedding,
    }
    return made | _WRITERS[kind](model)


def _kind(model: LanguageModelConfig) -> str:
    if model.norm.offset:
        return "gemma3_text" if model.norm.queries else "gemma2"
    if model.norm.queries:
        return "qwen3"
    if model.qkv_bias:
        return "qwen2"
    return "llama" if model.window.size is None else "mistral"


_CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
}


def _write_llama(model: LanguageModelConfig) -> dict[str, Any]:
    return {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}


def _write_mistral(model: LanguageModelConfig) -> dict[str, Any]:
    return {"hidden_act": "silu", "sliding_window": model.window.size}


def _write_qwen(model: LanguageModelConfig) -> dict[str, Any]:
    windows = {} if model.window.size is None else {"layer_types": _layer_types(model)}
    more = {"max_window_layers": model.num_blocks, "sliding_window": model.window.size}
    return {"hidden_act": "silu", "use_sliding_window": model.window.size is not None, **more, **windows}


def _write_gemma2(model: LanguageModelConfig) -> dict[str, Any]:
    return _write_gemma(model) | {
        "attn_logit_softcapping": model.attention_softcap,
        "final_logit_softcapping": model.logit_softcap,
    }


def _write_gemma3(model: LanguageModelConfig) -> dict[str, Any]:
    local = model.rope_theta if model.window.rope_theta is None else model.window.rope_theta
    return _write_gemma(model) | {"rope_local_base_freq": local}


def _write_gemma(model: LanguageModelConfig) -> dict[str, Any]:
    scalar = model.features_of_a_head if model.query_scalar is None else model.query_scalar
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": int(scalar) if float(scalar).is_integer() else scalar,
        "sliding_window": model.window.size or 4096,
        "layer_types": _layer_types(model),
    }


def _layer_types(model: LanguageModelConfig) -> list[str]:
    return [_LOCAL if model.has_window(block) else _GLOBAL for block in range(model.num_blocks)]


_WRITERS: dict[str, Callable[[LanguageModelConfig], dict[str, Any]]] = {
    "llama": _write_llama,
    "mistral": _write_mistral,
    "qwen2": _write_qwen,
    "qwen3": _write_qwen,
    "gemma2": _write_gemma2,
    "gemma3_text": _write_gemma3,
}
