"""Tensors of Llama and its relatives: Mistral, Qwen 2 and 3, Gemma 2 and 3."""

from collections.abc import Sequence

from meshpipe.models.language_model import LanguageModelConfig
from meshpipe.weights.entry import Entry

_BLOCK, _LAYER = "model.layers.{block}", "layers/{layer}"


def _in_block(name: str, path: str, dims: str = "") -> Entry:
    return Entry(f"{_BLOCK}.{name}", f"{_LAYER}/{path}", dims)


_ENDS = (
    Entry("model.embed_tokens.weight", "layers/0/embedding"),
    Entry("model.norm.weight", "layers/{last}/norm/scale"),
)
HEAD = Entry("lm_head.weight", "layers/{last}/tokens/embedding")
_PROJECTION = "(heads head_dim) embed -> embed heads head_dim"
_ATTENTION = (
    _in_block("self_attn.q_proj.weight", "attention/query/kernel", _PROJECTION),
    _in_block("self_attn.k_proj.weight", "attention/key/kernel", _PROJECTION),
    _in_block("self_attn.v_proj.weight", "attention/value/kernel", _PROJECTION),
    _in_block("self_attn.o_proj.weight", "attention/out/kernel", "embed (heads head_dim) -> heads head_dim embed"),
)
_BIAS = "(heads head_dim) -> heads head_dim"
_BIASES = (
    _in_block("self_attn.q_proj.bias", "attention/query/bias", _BIAS),
    _in_block("self_attn.k_proj.bias", "attention/key/bias", _BIAS),
    _in_block("self_attn.v_proj.bias", "attention/value/bias", _BIAS),
)
_HEAD_NORMS = (
    _in_block("self_attn.q_norm.weight", "attention/query_norm/scale"),
    _in_block("self_attn.k_norm.weight", "attention/key_norm/scale"),
)
_SWIGLU = (
    _in_block("mlp.gate_proj.weight", "swiglu/gate/kernel", "hidden embed -> embed hidden"),
    _in_block("mlp.up_proj.weight", "swiglu/up/kernel", "hidden embed -> embed hidden"),
    _in_block("mlp.down_proj.weight", "swiglu/down/kernel", "embed hidden -> hidden embed"),
)
_NORMS = (
    _in_block("input_layernorm.weight", "attention_norm/scale"),
    _in_block("post_attention_layernorm.weight", "swiglu_norm/scale"),
)
_NORMS_OF_BRANCHES = (
    _in_block("input_layernorm.weight", "attention_norm/scale"),
    _in_block("post_attention_layernorm.weight", "attention_post_norm/scale"),
    _in_block("pre_feedforward_layernorm.weight", "swiglu_norm/scale"),
    _in_block("post_feedforward_layernorm.weight", "swiglu_post_norm/scale"),
)


def decoder_table(model: LanguageModelConfig) -> Sequence[Entry]:
    """The entries for the parts that the model has."""
    return (
        *_ENDS,
        *(() if model.tie_embedding else (HEAD,)),
        *_ATTENTION,
        *(_BIASES if model.qkv_bias else ()),
        *(_HEAD_NORMS if model.norm.queries else ()),
        *_SWIGLU,
        *(_NORMS_OF_BRANCHES if model.norm.branches else _NORMS),
    )
