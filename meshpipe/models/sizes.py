"""Published models by name: the fields of their config.json, with computation in bfloat16 as they were trained.

`meshpipe.models.sizes.llama3_8b()` is a config as any other; `dataclasses.replace` changes it. The counts include the
embedding, and a head that is tied to it once.

The values were compared with those that LitGPT has for the same models (litgpt/config.py of Lightning-AI/litgpt on
GitHub, at commit 26857050). They agree, but for the window of Mistral 7B, which LitGPT leaves out, and the epsilon of
Gemma and the vocabulary of Gemma 3, which are those of transformers. LitGPT lacks three: Mistral Nemo was compared with
the published config.json (in mistral/mistral_config.py of kevinstephano/thunder_model_blocks), Gemma 3 270M with
ch05/12_gemma3 of rasbt/LLMs-from-scratch, and GPT-2 with model.py of karpathy/nanoGPT. They agree.
"""

from dataclasses import replace

from meshpipe.models.gpt2 import GPT2Config
from meshpipe.models.language_model import LanguageModelConfig, WindowConfig
from meshpipe.models.norms import NormConfig
from meshpipe.models.rope import RopeScaling


def llama2_7b() -> LanguageModelConfig:
    """6.7 billion parameters (arXiv 2307.09288)."""
    return LanguageModelConfig.llama_7b()


def llama2_13b() -> LanguageModelConfig:
    """13.0 billion parameters (arXiv 2307.09288)."""
    return replace(llama2_7b(), d_model=5120, num_blocks=40, num_heads=40, num_kv_heads=40, d_hidden=13_824)


def llama2_70b() -> LanguageModelConfig:
    """69.0 billion parameters (arXiv 2307.09288)."""
    return LanguageModelConfig.llama_70b()


def llama3_8b() -> LanguageModelConfig:
    """8.0 billion parameters, texts of 8192 tokens (arXiv 2407.21783, table 3)."""
    return LanguageModelConfig(
        d_model=4096,
        num_blocks=32,
        num_heads=32,
        num_kv_heads=8,
        d_hidden=14_336,
        vocab_size=128_256,
        rope_theta=500_000.0,
        dtype="bfloat16",
    )


def llama3_70b() -> LanguageModelConfig:
    """70.6 billion parameters, texts of 8192 tokens (arXiv 2407.21783, table 3)."""
    return replace(llama3_8b(), d_model=8192, num_blocks=80, num_heads=64, d_hidden=28_672)


def llama3_1_8b() -> LanguageModelConfig:
    """8.0 billion parameters, texts of 128 thousand tokens (arXiv 2407.21783)."""
    return replace(llama3_8b(), rope_scaling=RopeScaling(kind="llama3", factor=8.0))


def llama3_1_70b() -> LanguageModelConfig:
    """70.6 billion parameters, also those of Llama 3.3 (arXiv 2407.21783)."""
    return replace(llama3_70b(), rope_scaling=RopeScaling(kind="llama3", factor=8.0))


def llama3_1_405b() -> LanguageModelConfig:
    """405.9 billion parameters (arXiv 2407.21783, table 3)."""
    return replace(llama3_1_8b(), d_model=16_384, num_blocks=126, num_heads=128, d_hidden=53_248)


def llama3_2_1b() -> LanguageModelConfig:
    """1.2 billion parameters."""
    return replace(
        llama3_8b(),
        d_model=2048,
        num_blocks=16,
        d_hidden=8192,
        tie_embedding=True,
        rope_scaling=RopeScaling(kind="llama3", factor=32.0),
    )


def llama3_2_3b() -> LanguageModelConfig:
    """3.2 billion parameters."""
    return replace(llama3_2_1b(), d_model=3072, num_blocks=28, num_heads=24)


def mistral_7b() -> LanguageModelConfig:
    """7.2 billion parameters, the first version, with its window (arXiv 2310.06825)."""
    return replace(
        llama3_8b(),
        vocab_size=32_000,
        rope_theta=10_000.0,
        window=WindowConfig(size=4096),
    )


def mistral_7b_v0_3() -> LanguageModelConfig:
    """7.2 billion parameters, without a window and with a larger vocabulary."""
    return replace(llama3_8b(), vocab_size=32_768, rope_theta=1_000_000.0)


def mistral_nemo_12b() -> LanguageModelConfig:
    """12.2 billion parameters."""
    return replace(mistral_7b_v0_3(), d_model=5120, num_blocks=40, head_dim=128, vocab_size=131_072)


def qwen2_5_0_5b() -> LanguageModelConfig:
    """0.49 billion parameters (arXiv 2412.15115)."""
    return replace(
        qwen2_5_7b(),
        d_model=896,
        num_blocks=24,
        num_heads=14,
        num_kv_heads=2,
        d_hidden=4864,
        vocab_size=151_936,
        tie_embedding=True,
    )


def qwen2_5_1_5b() -> LanguageModelConfig:
    """1.5 billion parameters (arXiv 2412.15115)."""
    return replace(qwen2_5_0_5b(), d_model=1536, num_blocks=28, num_heads=12, d_hidden=8960)


def qwen2_5_3b() -> LanguageModelConfig:
    """3.1 billion parameters (arXiv 2412.15115)."""
    return replace(qwen2_5_0_5b(), d_model=2048, num_blocks=36, num_heads=16, d_hidden=11_008)


def qwen2_5_7b() -> LanguageModelConfig:
    """7.6 billion parameters (arXiv 2412.15115)."""
    return LanguageModelConfig(
        d_model=3584,
        num_blocks=28,
        num_heads=28,
        num_kv_heads=4,
        d_hidden=18_944,
        vocab_size=152_064,
        rope_theta=1_000_000.0,
        qkv_bias=True,
        norm=NormConfig(epsilon=1e-6),
        dtype="bfloat16",
    )


def qwen3_0_6b() -> LanguageModelConfig:
    """0.60 billion parameters (arXiv 2505.09388)."""
    return replace(
        qwen3_8b(), d_model=1024, num_blocks=28, num_heads=16, head_dim=128, d_hidden=3072, tie_embedding=True
    )


def qwen3_1_7b() -> LanguageModelConfig:
    """1.7 billion parameters (arXiv 2505.09388)."""
    return replace(qwen3_0_6b(), d_model=2048, d_hidden=6144)


def qwen3_4b() -> LanguageModelConfig:
    """4.0 billion parameters (arXiv 2505.09388)."""
    return replace(qwen3_8b(), d_model=2560, head_dim=128, d_hidden=9728, tie_embedding=True)


def qwen3_8b() -> LanguageModelConfig:
    """8.2 billion parameters (arXiv 2505.09388)."""
    return LanguageModelConfig(
        d_model=4096,
        num_blocks=36,
        num_heads=32,
        num_kv_heads=8,
        d_hidden=12_288,
        vocab_size=151_936,
        rope_theta=1_000_000.0,
        norm=NormConfig(epsilon=1e-6, queries=True),
        dtype="bfloat16",
    )


def qwen3_14b() -> LanguageModelConfig:
    """14.8 billion parameters (arXiv 2505.09388)."""
    return replace(qwen3_8b(), d_model=5120, num_blocks=40, num_heads=40, d_hidden=17_408)


def qwen3_32b() -> LanguageModelConfig:
    """32.8 billion parameters (arXiv 2505.09388)."""
    return replace(qwen3_8b(), d_model=5120, num_blocks=64, num_heads=64, head_dim=128, d_hidden=25_600)


def gemma2_2b() -> LanguageModelConfig:
    """2.6 billion parameters (arXiv 2408.00118, tables 1 and 2)."""
    return LanguageModelConfig(
        d_model=2304,
        num_blocks=26,
        num_heads=8,
        num_kv_heads=4,
        head_dim=256,
        d_hidden=9216,
        vocab_size=256_000,
        tie_embedding=True,
        gate="gelu",
        query_scalar=256.0,
        attention_softcap=50.0,
        logit_softcap=30.0,
        scale_embedding=True,
        norm=NormConfig(epsilon=1e-6, offset=True, branches=True),
        window=WindowConfig(size=4096, global_every=2),
        dtype="bfloat16",
    )


def gemma2_9b() -> LanguageModelConfig:
    """9.2 billion parameters (arXiv 2408.00118, tables 1 and 2)."""
    return replace(gemma2_2b(), d_model=3584, num_blocks=42, num_heads=16, num_kv_heads=8, d_hidden=14_336)


def gemma2_27b() -> LanguageModelConfig:
    """27.2 billion parameters (arXiv 2408.00118, tables 1 and 2)."""
    return replace(
        gemma2_2b(),
        d_model=4608,
        num_blocks=46,
        num_heads=32,
        num_kv_heads=16,
        head_dim=128,
        d_hidden=36_864,
        query_scalar=144.0,
    )


def gemma3_270m() -> LanguageModelConfig:
    """0.27 billion parameters."""
    return replace(gemma3_1b(), d_model=640, num_blocks=18, d_hidden=2048)


def gemma3_1b() -> LanguageModelConfig:
    """1.0 billion parameters (arXiv 2503.19786, table 1)."""
    return replace(
        gemma2_2b(),
        d_model=1152,
        num_heads=4,
        num_kv_heads=1,
        d_hidden=6912,
        vocab_size=262_144,
        rope_theta=1_000_000.0,
        attention_softcap=None,
        logit_softcap=None,
        norm=NormConfig(epsilon=1e-6, offset=True, branches=True, queries=True),
        window=WindowConfig(size=512, global_every=6, rope_theta=10_000.0),
    )


def gemma3_4b() -> LanguageModelConfig:
    """3.9 billion parameters of the language model; the one that sees is left out (arXiv 2503.19786, table 1)."""
    return replace(
        gemma3_1b(),
        d_model=2560,
        num_blocks=34,
        num_heads=8,
        num_kv_heads=4,
        d_hidden=10_240,
        vocab_size=262_208,
        rope_scaling=RopeScaling(kind="linear", factor=8.0),
        window=WindowConfig(size=1024, global_every=6, rope_theta=10_000.0),
    )


def gemma3_12b() -> LanguageModelConfig:
    """11.8 billion parameters of the language model; the one that sees is left out (arXiv 2503.19786, table 1)."""
    return replace(gemma3_4b(), d_model=3840, num_blocks=48, num_heads=16, num_kv_heads=8, d_hidden=15_360)


def gemma3_27b() -> LanguageModelConfig:
    """27.0 billion parameters of the language model; the one that sees is left out (arXiv 2503.19786, table 1)."""
    return replace(
        gemma3_4b(),
        d_model=5376,
        num_blocks=62,
        num_heads=32,
        num_kv_heads=16,
        head_dim=128,
        d_hidden=21_504,
        query_scalar=168.0,
    )


def gpt2() -> GPT2Config:
    """0.12 billion parameters (Radford et al. 2019, table 2)."""
    return GPT2Config(d_model=768, num_blocks=12, num_heads=12, vocab_size=50_257)


def gpt2_medium() -> GPT2Config:
    """0.35 billion parameters (Radford et al. 2019, table 2)."""
    return replace(gpt2(), d_model=1024, num_blocks=24, num_heads=16)


def gpt2_large() -> GPT2Config:
    """0.77 billion parameters (Radford et al. 2019, table 2)."""
    return replace(gpt2(), d_model=1280, num_blocks=36, num_heads=20)


def gpt2_xl() -> GPT2Config:
    """1.6 billion parameters (Radford et al. 2019, table 2)."""
    return replace(gpt2(), d_model=1600, num_blocks=48, num_heads=25)
