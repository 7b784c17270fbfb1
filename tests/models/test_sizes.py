"""Published models have as many parameters as was published."""

import inspect
import math
from dataclasses import replace
from functools import cache
from typing import Any

import pytest

from meshpipe.layers.examine import abstract_layers
from meshpipe.models import GPT2Config, LanguageModelConfig, sizes

PARAMETERS = {
    # What the safetensors metadata of the published weights count. arXiv 2307.09288, 2407.21783 (405B) and the model
    # card of Llama 3.2 (1.23 and 3.21 billion) have the same, rounded.
    "llama2_7b": 6_738_415_616,
    "llama2_13b": 13_015_864_320,
    "llama2_70b": 68_976_648_192,
    "llama3_8b": 8_030_261_248,
    "llama3_70b": 70_553_706_496,
    "llama3_1_8b": 8_030_261_248,
    "llama3_1_70b": 70_553_706_496,
    "llama3_1_405b": 405_853_388_800,
    "llama3_2_1b": 1_235_814_400,
    "llama3_2_3b": 3_212_749_824,
    "mistral_7b": 7_241_732_096,
    "mistral_7b_v0_3": 7_248_023_552,
    "mistral_nemo_12b": 12_247_782_400,
    # Likewise; rounded in arXiv 2412.15115, table 1 (0.49, 1.54, 3.09 and 7.61 billion in the model cards).
    "qwen2_5_0_5b": 494_032_768,
    "qwen2_5_1_5b": 1_543_714_304,
    "qwen2_5_3b": 3_085_938_688,
    "qwen2_5_7b": 7_615_616_512,
    # Likewise, with tied weights once; arXiv 2505.09388, table 1.
    "qwen3_0_6b": 596_049_920,
    "qwen3_1_7b": 1_720_574_976,
    "qwen3_4b": 4_022_468_096,
    "qwen3_8b": 8_190_735_360,
    "qwen3_14b": 14_768_307_200,
    "qwen3_32b": 32_762_123_264,
    "gemma3_270m": 268_098_176,
    "gemma3_1b": 999_885_952,
    # Radford et al. 2019 round to 117, 345, 762 and 1542 million; the weights have these.
    "gpt2": 124_439_808,
    "gpt2_medium": 354_823_168,
    "gpt2_large": 774_030_080,
    "gpt2_xl": 1_557_611_200,
}
WITHOUT_EMBEDDING = {
    # arXiv 2408.00118, table 2.
    "gemma2_2b": 2_024_517_888,
    "gemma2_9b": 8_324_201_984,
    "gemma2_27b": 26_047_480_320,
}
MILLIONS_WITHOUT_EMBEDDING = {
    # arXiv 2503.19786, table 1.
    "gemma3_1b": 698,
    "gemma3_4b": 3_209,
    "gemma3_12b": 10_759,
    "gemma3_27b": 25_600,
}


def found() -> dict[str, LanguageModelConfig | GPT2Config]:
    functions = inspect.getmembers(sizes, inspect.isfunction)
    return {name: function() for name, function in functions if function.__module__ == sizes.__name__}


MODELS = found()


@cache
def parameters(name: str) -> int:
    """Blocks are alike, so one of them tells how many parameters each has."""
    config = MODELS[name]
    embedding, block, head = abstract_layers(replace(config, num_blocks=1).layers(), ())
    copies = {"layers/2/tokens/embedding"} if config.tied() else set()
    of_layers = [
        sum(math.prod(p.shape) for path, p in layer.params.items() if path not in copies)
        for layer in (embedding, block, head)
    ]
    return of_layers[0] + config.num_blocks * of_layers[1] + of_layers[2]


def test_every_model_is_counted() -> None:
    assert set(MODELS) == PARAMETERS.keys() | WITHOUT_EMBEDDING.keys() | MILLIONS_WITHOUT_EMBEDDING.keys()


@pytest.mark.parametrize("name", MODELS)
def test_as_many_parameters_as_published(name: str) -> None:
    config = MODELS[name]
    count = parameters(name)
    others = count - config.vocab_size * config.d_model
    assert count == PARAMETERS.get(name, count)
    assert others == WITHOUT_EMBEDDING.get(name, others)
    assert round(others / 1e6) == MILLIONS_WITHOUT_EMBEDDING.get(name, round(others / 1e6))


def test_the_blocks_without_a_window() -> None:
    gemma = sizes.gemma3_1b()
    assert [block for block in range(gemma.num_blocks) if not gemma.has_window(block)] == [5, 11, 17, 23]
    assert [sizes.gemma2_2b().has_window(block) for block in range(4)] == [True, False, True, False]
    assert all(sizes.mistral_7b().has_window(block) for block in range(32))
    assert not any(sizes.llama3_8b().has_window(block) for block in range(32))


@pytest.mark.parametrize("name", MODELS)
def test_the_docstring_says_how_many(name: str) -> None:
    said = float((getattr(sizes, name).__doc__ or "").split()[0])
    assert said == round(parameters(name) / 1e9, 2 if said < 1 else 1)


@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
def test_blocks_that_are_alike_have_one_constructor(param_dtype: Any) -> None:
    """So that each kind is examined once, however many there are."""
    for model, kinds in ((sizes.llama3_8b(), 3), (sizes.gemma2_2b(), 4), (sizes.gpt2(), 3)):
        made = replace(model, param_dtype=param_dtype).layers()
        assert len({id(layer) for layer in made}) == kinds
