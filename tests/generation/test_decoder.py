"""Caches are updated in place, stay on the submeshes of their stages, and have no more slots than are read."""

from collections import deque

import golden
import numpy as np
import pytest

from meshpipe import make_mesh
from meshpipe.generation.caching_model import is_cache
from meshpipe.generation.config import SamplingConfig
from meshpipe.generation.generator import Generator
from meshpipe.generation.requests import Request
from meshpipe.generation.running_group import RunningGroup

PROMPT = [5, 17, 3, 80, 9]


@pytest.fixture(scope="module")
def generator() -> Generator:
    """A model with windows of 6 in two of three blocks, on two ranks."""
    return Generator(golden.CONFIGS["gemma3"], golden.leaves("gemma3"), mesh=make_mesh(2))


@pytest.mark.slow
def test_prompts_alone_together_and_in_any_order_give_the_same_tokens(generator: Generator) -> None:
    prompts = [PROMPT[: 1 + i % 5] for i in range(9)]
    sampling = SamplingConfig(max_tokens=7, temperature=0.7, top_k=9, seed=3)
    together = generator.tokens(prompts[:5], sampling)
    assert [len(tokens) for tokens in together] == [7] * 5
    smaller = Generator(golden.CONFIGS["gemma3"], golden.leaves("gemma3"), mesh=make_mesh(1), batch_size=2)
    assert smaller.tokens(prompts[:5], sampling) == together
    assert together[0] != generator.tokens(prompts[:1], max_tokens=7, temperature=0.7, top_k=9, seed=4)[0]


@pytest.mark.slow
def test_a_text_ends_at_a_stop_token(generator: Generator) -> None:
    whole, other = generator.tokens([PROMPT, PROMPT[:2]], max_tokens=12)
    stop = whole[4]
    cut, of_other = generator.tokens([PROMPT, PROMPT[:2]], max_tokens=12, stop_tokens=(stop,))
    assert cut == whole[: whole.index(stop)]
    assert of_other == (other[: other.index(stop)] if stop in other else other)


def test_caches_are_updated_in_place_where_their_stages_are(generator: Generator) -> None:
    generator.tokens([PROMPT], max_tokens=2)
    decoder = next(d for d in generator._decoders.values() if d.batch == 1)
    request = Request(number=0, prompt=PROMPT, sampling=SamplingConfig(max_tokens=9))
    group = RunningGroup.of(decoder)
    group.advance(deque([request]))
    paths = {s: [p for p in decoder.whole.model.parameters[s].state if is_cache(p)] for s in decoder.whole.model.local}
    assert sum(map(len, paths.values())) == 2 * 4
    before = {s: group.texts.state[s] for s in paths}
    pointers = {s: [a.unsafe_buffer_pointer() for a in before[s]] for s in paths}
    group.advance(deque())
    for s, arrays in before.items():
        assert all(array.is_deleted() for array in arrays)
        after = group.texts.state[s]
        assert [array.unsafe_buffer_pointer() for array in after] == pointers[s]
        mesh = decoder.whole.model.stages[s].submesh
        assert all(array.sharding.device_set == set(mesh.devices.flat) for array in after)
    shapes = [shape for s in paths for p, shape in decoder.whole.model.parameters[s].state.items() if is_cache(p)]
    assert sorted(shape.shape[1] for shape in shapes) == [6] * 6 + [32] * 2  # windows need no more than they see


def test_the_last_tokens_are_waited_for_one_after_the_other(generator: Generator) -> None:
    """Meanwhile other groups ask for theirs."""
    generator.tokens([PROMPT], max_tokens=2)
    decoder = next(d for d in generator._decoders.values() if d.batch == 1)
    group = RunningGroup.of(decoder)
    waiting = deque([Request(number=0, prompt=PROMPT, sampling=SamplingConfig(max_tokens=3))])
    for _ in range(3):
        group.advance(waiting)
    assert [len(list(group.read())) for _ in range(3)] == [1, 1, 1]
    assert group.has_ended


def test_caches_are_split_over_data_and_tensor() -> None:
    generator = Generator(golden.CONFIGS["qwen3"], golden.leaves("qwen3"), mesh=make_mesh(1, 2, 2))
    whole = generator.caches([PROMPT] * 3, SamplingConfig(max_tokens=16)).whole
    for path, shape in whole.model.parameters[0].state.items():
        assert shape.shape == (4, 32, 2, 8), path  # three texts are filled up to four
        assert shape.sharding.shard_shape(shape.shape) == (2, 32, 1, 8)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([[]], "at least one token"),
        ([[1], [288]], "Every token must be one of the model's 288. Got 288 in prompt 1"),
        ([[1] * 60], "must fit into the 64 positions"),
    ],
)
def test_wrong_prompts(prompts: list[list[int]], message: str) -> None:
    generator = Generator(golden.CONFIGS["gpt2"], golden.leaves("gpt2"))
    with pytest.raises(ValueError, match=message):
        generator.tokens(prompts, max_tokens=5)


def test_weights_of_another_model() -> None:
    leaves = golden.leaves("gpt2")
    wrong = {**leaves, "layers/0/tokens/embedding": np.zeros((3, 16), np.float32)}
    with pytest.raises(ValueError, match=r"Got one of \[3, 16\] for layers/0/tokens/embedding \[288, 16\]"):
        Generator(golden.CONFIGS["gpt2"], wrong)
    del leaves["layers/1/attention_norm/scale"]
    with pytest.raises(ValueError, match="Got none for layers/1/attention_norm/scale"):
        Generator(golden.CONFIGS["gpt2"], leaves)


def test_text_needs_a_tokenizer() -> None:
    generator = Generator(golden.CONFIGS["gpt2"], golden.leaves("gpt2"))
    with pytest.raises(ValueError, match="Text needs a tokenizer"):
        generator.generate("text")
