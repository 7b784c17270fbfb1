"""The tiny models in models/golden/, each with the config that it should have here and its weights by leaf path.

They are read without meshpipe's own tables of weights, which are tested against them. `models/make_golden.py` says what
the folders hold.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx

from meshpipe.layers.examine import abstract_layers
from meshpipe.layers.modules import modules_with
from meshpipe.models import GPT2Config, LanguageModelConfig
from meshpipe.models.language_model import WindowConfig
from meshpipe.models.norms import NormConfig
from meshpipe.models.rope import RopeScaling

FOLDER = Path(__file__).parent / "models" / "golden"
TOLERANCE = 1e-5
"""Of logits in float32, which are within +-8."""

_SIZES: dict[str, Any] = {
    "d_model": 16,
    "num_blocks": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "d_hidden": 32,
    "vocab_size": 288,
    "norm": NormConfig(epsilon=1e-6),
}
_GEMMA = _SIZES | {
    "head_dim": 8,
    "query_scalar": 12.0,
    "gate": "gelu",
    "tie_embedding": True,
    "scale_embedding": True,
}
CONFIGS: dict[str, LanguageModelConfig | GPT2Config] = {
    "llama2": LanguageModelConfig(**_SIZES | {"num_kv_heads": 4}),
    "llama3": LanguageModelConfig(
        **_SIZES,
        head_dim=8,
        tie_embedding=True,
        rope_theta=500_000.0,
        rope_scaling=RopeScaling(kind="llama3", factor=8.0, original_positions=16),
    ),
    "mistral": LanguageModelConfig(**_SIZES, window=WindowConfig(size=6)),
    "qwen2": LanguageModelConfig(**_SIZES, qkv_bias=True, tie_embedding=True),
    "qwen3": LanguageModelConfig(
        **_SIZES | {"norm": NormConfig(epsilon=1e-6, queries=True)}, head_dim=8, tie_embedding=True
    ),
    "qwen3_yarn": LanguageModelConfig(
        **_SIZES | {"norm": NormConfig(epsilon=1e-6, queries=True)},
        head_dim=8,
        tie_embedding=True,
        rope_theta=100.0,
        rope_scaling=RopeScaling(kind="yarn", factor=4.0, original_positions=16, beta_slow=0.05),
    ),
    "gemma2": LanguageModelConfig(
        **_GEMMA | {"norm": NormConfig(epsilon=1e-6, offset=True, branches=True)},
        attention_softcap=2.0,
        logit_softcap=5.0,
        window=WindowConfig(size=6, global_every=2),
    ),
    "gemma3": LanguageModelConfig(
        **_GEMMA | {"num_blocks": 4, "norm": NormConfig(epsilon=1e-6, offset=True, branches=True, queries=True)},
        rope_theta=1_000_000.0,
        rope_scaling=RopeScaling(kind="linear", factor=8.0),
        window=WindowConfig(size=6, global_every=3, rope_theta=10_000.0),
    ),
    "gpt2": GPT2Config(d_model=16, num_blocks=2, num_heads=4, vocab_size=288, max_positions=64),
}


def expected(name: str) -> dict[str, np.ndarray]:
    with np.load(FOLDER / name / "expected.npz") as arrays:
        return dict(arrays)


def tensors(name: str) -> dict[str, np.ndarray]:
    """All tensors of a folder, by name."""
    found = {}
    for file in sorted((FOLDER / name).glob("*.safetensors")):
        data = file.read_bytes()
        size = int.from_bytes(data[:8], "little")
        for tensor, entry in json.loads(data[8 : 8 + size]).items():
            if tensor != "__metadata__":
                dtype = {"F32": np.float32, "BF16": ml_dtypes.bfloat16}[entry["dtype"]]
                first, last = (8 + size + offset for offset in entry["data_offsets"])
                found[tensor] = np.frombuffer(data[first:last], dtype).reshape(entry["shape"])
    return found


def leaves(name: str) -> dict[str, np.ndarray]:
    """The parameters, by leaf path."""
    return (_gpt2 if name == "gpt2" else _llama)(tensors(name), CONFIGS[name])


def modules(name: str, config: Any = None) -> list[nnx.Module]:
    """The layers with their weights; `config` may differ from the folder's in what has no weights."""
    config = CONFIGS[name] if config is None else config
    values = {path: jnp.asarray(value) for path, value in leaves(name).items()}
    layers, device = abstract_layers(config.layers(), None), jax.local_devices(backend="cpu")[0]
    return modules_with(layers, values, config.tied(), seed=0, device=device, train=False)


def _llama(given: dict[str, np.ndarray], config: Any) -> dict[str, np.ndarray]:
    branches = config.norm.branches
    norms = {
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "attention_post_norm" if branches else "swiglu_norm",
        "pre_feedforward_layernorm": "swiglu_norm",
        "post_feedforward_layernorm": "swiglu_post_norm",
        "self_attn.q_norm": "attention/query_norm",
        "self_attn.k_norm": "attention/key_norm",
    }
    size = config.features_of_a_head
    parts: dict[str, tuple[str, Callable[[np.ndarray], np.ndarray]]] = {
        f"{theirs}.weight": (f"{ours}/scale", lambda x: x) for theirs, ours in norms.items()
    }
    for letter, ours in (("q", "query"), ("k", "key"), ("v", "value")):
        parts[f"self_attn.{letter}_proj.weight"] = f"attention/{ours}/kernel", lambda x: _heads(x.T, size)
        parts[f"self_attn.{letter}_proj.bias"] = f"attention/{ours}/bias", lambda x: _heads(x, size)
    parts["self_attn.o_proj.weight"] = "attention/out/kernel", lambda x: x.T.reshape(-1, size, config.d_model)
    for ours in ("gate", "up", "down"):
        parts[f"mlp.{ours}_proj.weight"] = f"swiglu/{ours}/kernel", lambda x: x.T
    last = f"layers/{config.num_blocks + 1}"
    embedding = given["model.embed_tokens.weight"]
    made = {
        "layers/0/embedding": embedding,
        f"{last}/tokens/embedding": given.get("lm_head.weight", embedding),
        f"{last}/norm/scale": given["model.norm.weight"],
    }
    for name, value in given.items():
        if name.startswith("model.layers."):
            _, _, block, part = name.split(".", 3)
            ours, change = parts[part]
            made[f"layers/{int(block) + 1}/{ours}"] = change(value)
    return made


def _gpt2(given: dict[str, np.ndarray], config: Any) -> dict[str, np.ndarray]:
    size = config.d_model // config.num_heads
    last = f"layers/{config.num_blocks + 1}"
    made = {
        "layers/0/tokens/embedding": given["transformer.wte.weight"],
        "layers/0/positions/embedding": given["transformer.wpe.weight"],
        f"{last}/tokens/embedding": given["transformer.wte.weight"],
        f"{last}/norm/scale": given["transformer.ln_f.weight"],
        f"{last}/norm/bias": given["transformer.ln_f.bias"],
    }
    for block in range(config.num_blocks):
        ours, theirs = f"layers/{block + 1}", f"transformer.h.{block}"
        for norm, name in (("attention_norm", "ln_1"), ("perceptron_norm", "ln_2")):
            made[f"{ours}/{norm}/scale"] = given[f"{theirs}.{name}.weight"]
            made[f"{ours}/{norm}/bias"] = given[f"{theirs}.{name}.bias"]
        for leaf, name in (("kernel", "weight"), ("bias", "bias")):
            together = np.split(given[f"{theirs}.attn.c_attn.{name}"], 3, axis=-1)
            for part, value in zip(("query", "key", "value"), together, strict=True):
                made[f"{ours}/attention/{part}/{leaf}"] = _heads(value, size)
            made[f"{ours}/perceptron/up/{leaf}"] = given[f"{theirs}.mlp.c_fc.{name}"]
            made[f"{ours}/perceptron/down/{leaf}"] = given[f"{theirs}.mlp.c_proj.{name}"]
        out = given[f"{theirs}.attn.c_proj.weight"]
        made[f"{ours}/attention/out/kernel"] = out.reshape(-1, size, config.d_model)
        made[f"{ours}/attention/out/bias"] = given[f"{theirs}.attn.c_proj.bias"]
    return made


def _heads(x: np.ndarray, size: int) -> np.ndarray:
    return x.reshape(*x.shape[:-1], -1, size)
