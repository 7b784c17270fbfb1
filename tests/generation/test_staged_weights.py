"""Weights of a model that computes in bfloat16, kept in bfloat16: half the bytes, and the same tokens and scores."""

from dataclasses import replace

import golden
import jax
import pytest

from meshpipe import make_mesh
from meshpipe.generation.generator import Generator

PROMPTS = [[5, 17, 3, 80, 9], [1, 2], [44] * 11]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "ranks"), [("qwen3", 2), ("gemma2", 1), ("gpt2", 2)])
def test_weights_in_bfloat16_give_the_same_tokens(name: str, ranks: int) -> None:
    model, leaves = replace(golden.CONFIGS[name], dtype="bfloat16"), golden.leaves(name)
    found = {}
    for dtype in ("float32", "bfloat16"):
        generator = Generator(model, leaves, mesh=make_mesh(ranks), weights_dtype=dtype)
        drawn = generator.tokens(PROMPTS, max_tokens=12, temperature=0.7, seed=3)
        found[dtype] = drawn, generator.scorer.tokens([(PROMPTS[0], PROMPTS[2])])
        held = [leaf for own in generator._weights.values.values() for leaf in own.values()]
        assert {str(leaf.dtype) for leaf in held if leaf.ndim > 1} == {dtype}
        assert {str(leaf.dtype) for leaf in held if leaf.ndim == 1} == {"float32"}
    assert found["float32"] == found["bfloat16"]


def test_no_such_dtype() -> None:
    assert len(jax.devices()) >= 1
    with pytest.raises(ValueError, match=r"`weights_dtype` must be one of float32, bfloat16. Got 'float16'"):
        Generator(golden.CONFIGS["gpt2"], golden.leaves("gpt2"), weights_dtype="float16")
