"""Tensors and config.json of GPT-2."""

from collections.abc import Sequence
from typing import Any

from meshpipe.models.gpt2 import GPT2Config
from meshpipe.weights.entry import Entry
from meshpipe.weights.fields import Fields

PREFIX = "transformer."
"""Of all tensors, but in the files that were published first."""


def _in_block(name: str, path: str, dims: str = "", part: int = 0) -> Entry:
    return Entry(f"{PREFIX}h.{{block}}.{name}", f"layers/{{layer}}/{path}", dims, part)


# Unlike those of others, kernels are [inputs, outputs], and queries, keys and values lie side by side.
_TABLE = (
    Entry(f"{PREFIX}wte.weight", "layers/0/tokens/embedding"),
    Entry(f"{PREFIX}wpe.weight", "layers/0/positions/embedding"),
    Entry(f"{PREFIX}ln_f.weight", "layers/{last}/norm/scale"),
    Entry(f"{PREFIX}ln_f.bias", "layers/{last}/norm/bias"),
    _in_block("ln_1.weight", "attention_norm/scale"),
    _in_block("ln_1.bias", "attention_norm/bias"),
    _in_block("ln_2.weight", "perceptron_norm/scale"),
    _in_block("ln_2.bias", "perceptron_norm/bias"),
    *(
        entry
        for part, name in enumerate(("query", "key", "value"))
        for entry in (
            _in_block(
                "attn.c_attn.weight",
                f"attention/{name}/kernel",
                "embed (3 heads head_dim) -> embed heads head_dim",
                part,
            ),
            _in_block("attn.c_attn.bias", f"attention/{name}/bias", "(3 heads head_dim) -> heads head_dim", part),
        )
    ),
    _in_block("attn.c_proj.weight", "attention/out/kernel", "(heads head_dim) embed -> heads head_dim embed"),
    _in_block("attn.c_proj.bias", "attention/out/bias"),
    _in_block("mlp.c_fc.weight", "perceptron/up/kernel"),
    _in_block("mlp.c_fc.bias", "perceptron/up/bias"),
    _in_block("mlp.c_proj.weight", "perceptron/down/kernel"),
    _in_block("mlp.c_proj.bias", "perceptron/down/bias"),
)


def gpt2_table(model: GPT2Config) -> Sequence[Entry]:
    return _TABLE


def read_gpt2(fields: Fields) -> GPT2Config:
    fields.must_be("activation_function", "gelu_new", "gelu_pytorch_tanh")
    fields.must_be("tie_word_embeddings", True)
    fields.must_be("scale_attn_weights", True)
    fields.must_be("scale_attn_by_inverse_layer_idx", False)
    fields.must_be("add_cross_attention", False)
    width, hidden = fields.size("n_embd"), fields.optional_size("n_inner")
    return GPT2Config(
        d_model=width,
        num_blocks=fields.blocks("n_layer"),
        num_heads=fields.size("n_head"),
        d_hidden=None if hidden == 4 * width else hidden,
        vocab_size=fields.size("vocab_size"),
        max_positions=fields.size("n_positions"),
        norm_epsilon=fields.number("layer_norm_epsilon", 1e-5),
    )


def write_gpt2(model: GPT2Config) -> dict[str, Any]:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "n_embd": model.d_model,
        "n_layer": model.num_blocks,
        "n_head": model.num_heads,
        "n_inner": model.d_hidden,
        "vocab_size": model.vocab_size,
        "n_positions": model.max_positions,
        "n_ctx": model.max_positions,
        "layer_norm_epsilon": model.norm_epsilon,
        "tie_word_embeddings": True,
    }
