"""Makes the folders in golden/: tiny models with random weights as `transformers` saves them, and what they compute.

`python tests/models/make_golden.py [FOLDER]` needs torch and transformers; nothing is downloaded. Every folder has
config.json, model.safetensors (mistral: in parts, with an index) and expected.npz:

- `ids` int32 [rows, seq]: tokens; `logits` float32 [rows, seq, vocab]: what the model says of them.
- `prompt_lengths` int32 [rows]: the prompt of row i is `ids[i, :prompt_lengths[i]]`; `continuation` int32
  [rows, tokens]: what the model writes after it, always the most likely token.

llama3 and qwen2 have a tokenizer.json as well, and llama3 has the config.json of an older version of transformers, as
Meta's files have.
"""

import json
import sys
from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).with_name("golden")
VOCAB, ROWS, SEQ, NEW_TOKENS = 288, 3, 16, 12
PROMPT_LENGTHS = (4, 9, 13)
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_slow": 0.05,
}
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def configs() -> dict[str, "object"]:
    import transformers as hf

    gemma = {**SIZES, "head_dim": 8, "query_pre_attn_scalar": 12, "sliding_window": 6}
    # As from 4 billion parameters on.
    gemma3_rope = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
    }
    three_local = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
    return {
        "llama2": hf.LlamaConfig(**{**SIZES, "num_key_value_heads": 4}),
        "llama3": hf.LlamaConfig(
            **SIZES, head_dim=8, rope_parameters={"rope_theta": 500_000.0, **LLAMA3_ROPE}, tie_word_embeddings=True
        ),
        "mistral": hf.MistralConfig(**SIZES, sliding_window=6, head_dim=4),
        "qwen2": hf.Qwen2Config(**SIZES, tie_word_embeddings=True),
        "qwen3": hf.Qwen3Config(**SIZES, head_dim=8, tie_word_embeddings=True),
        "qwen3_yarn": hf.Qwen3Config(**SIZES, head_dim=8, tie_word_embeddings=True, rope_parameters=YARN_ROPE),
        "gemma2": hf.Gemma2Config(**gemma, attn_logit_softcapping=2.0, final_logit_softcapping=5.0),
        "gemma3": hf.Gemma3TextConfig(
            **{**gemma, "num_hidden_layers": 4, "layer_types": three_local}, rope_parameters=gemma3_rope
        ),
        "gpt2": hf.GPT2Config(
            vocab_size=VOCAB, n_positions=64, n_embd=16, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0
        ),
    }


def randomise(model: "object", seed: int) -> None:
    """Every parameter differs from what it is by default, so that none can be left out unnoticed."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):  # type: ignore[attr-defined]
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1:
            parameter.data = parameter.data + 0.3 * noise
        else:
            parameter.data = noise * (0.3 if "emb" in name or "wte" in name else parameter.shape[-1] ** -0.5)


def make(name: str, config: "object", folder: Path) -> None:
    import torch
    import transformers as hf

    for seed in range(100):
        model = hf.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        randomise(model, seed)
        ids = np.random.default_rng(seed).integers(1, VOCAB, (ROWS, SEQ)).astype(np.int32)
        with torch.no_grad():
            logits = model(torch.from_numpy(ids).long()).logits.numpy()
            written = [write(model, row[:length]) for row, length in zip(ids, PROMPT_LENGTHS, strict=True)]
        # Where two tokens are about as likely, another order of additions may write the other.
        if min(margin for _, margin in written) > 0.02:
            break
    else:
        raise SystemExit(f"{name}: no seed gives clear continuations")
    model.save_pretrained(folder, max_shard_size="10KB" if name == "mistral" else "1GB")
    if name in ("llama3", "qwen2"):
        save_tokenizer(folder)
    if name == "llama3":
        older_config(folder / "config.json")
    for file in folder.glob("*.safetensors"):
        file.chmod(0o644)
    np.savez_compressed(
        folder / "expected.npz",
        ids=ids,
        logits=logits,
        prompt_lengths=np.asarray(PROMPT_LENGTHS, np.int32),
        continuation=np.asarray([tokens for tokens, _ in written], np.int32),
    )
    print(f"{name}: seed {seed}, {sum(f.stat().st_size for f in folder.iterdir()) / 1e3:.0f} kB")


def write(model: "object", prompt: np.ndarray) -> tuple[list[int], float]:
    """The continuation of a prompt, and the smallest lead of a token's logit over the next."""
    import torch

    row, lead = torch.from_numpy(prompt).long()[None], np.inf
    for _ in range(NEW_TOKENS):
        best = model(row).logits[0, -1].topk(2)  # type: ignore[operator]
        lead = min(lead, float(best.values[0] - best.values[1]))
        row = torch.cat([row, best.indices[None, :1]], dim=1)
    start = torch.from_numpy(prompt).long()[None]
    model.generation_config.eos_token_id = None  # type: ignore[attr-defined]
    generated = model.generate(  # type: ignore[attr-defined]
        start, attention_mask=torch.ones_like(start), max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0
    )
    model.generation_config.eos_token_id = 0  # type: ignore[attr-defined]
    assert torch.equal(generated, row), (generated, row)
    return row[0, prompt.size :].tolist(), lead


def save_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = "the user and the assistant say that there is an answer to this question in the other one\n"
    tokenizer.train_from_iterator([text] * 10, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=special[0],
        eos_token=special[0],
        pad_token=special[0],
        chat_template=CHAT_TEMPLATE,
    )
    fast.save_pretrained(folder)


def older_config(path: Path) -> None:
    """The fields of config.json as files from before version 5 of transformers have them."""
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = rope
    config["torch_dtype"] = config.pop("dtype")
    config["transformers_version"] = "4.45.0"
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def main(folder: Path) -> None:
    for name, config in configs().items():
        make(name, config, folder / name)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else GOLDEN)
