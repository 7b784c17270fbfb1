"""The rows of texts that have ended are given to the next prompts, which changes no token."""

from collections import Counter
from functools import cache

import golden
import jax.numpy as jnp
import numpy as np
import pytest

from meshpipe import make_mesh
from meshpipe.generation.caching_model import is_cache
from meshpipe.generation.config import SamplingConfig
from meshpipe.generation.decoder import Decoder
from meshpipe.generation.generator import Generator
from meshpipe.generation.requests import Request, beginning_fields, sampling_fields
from meshpipe.generation.row_copies import put_rows
from meshpipe.phases import listening

LENGTHS = (3, 11, 1, 20, 5, 2, 9, 4, 13)
ENDS = (2, 9, 1, 4, 12, 3, 1, 7, 5)
PROMPTS = [[(7 * n + 3 * i * i) % 96 for i in range(length)] for n, length in enumerate(LENGTHS)]
DRAWN = SamplingConfig(max_tokens=12, temperature=0.8, top_k=20, seed=7)


def ends_at(tokens: list[list[int]], ends: tuple[int, ...]) -> object:
    """Ends each of these texts after so many tokens."""
    prefixes = [row[:end] for row, end in zip(tokens, ends, strict=True)]
    return lambda drawn: drawn in prefixes


@pytest.fixture(scope="module")
def generator() -> Generator:
    return Generator(golden.CONFIGS["llama2"], golden.leaves("llama2"), batch_size=2)


def test_rows_are_put_into_their_parts() -> None:
    kept, new = jnp.zeros((6, 2)), jnp.arange(1, 7).reshape(3, 2)
    found = put_rows(kept, new, jnp.array([1, 2, 0]))  # the second part has rows 0 and 1, so nothing is put there
    np.testing.assert_array_equal(found, [[0, 0], [1, 2], [0, 0], [0, 0], [5, 6], [0, 0]])


def test_texts_that_follow_others_are_those_of_transformers(generator: Generator) -> None:
    expected = golden.expected("llama2")
    prompts = [row[:n].tolist() for row, n in zip(expected["ids"], expected["prompt_lengths"], strict=True)]
    whole = expected["continuation"].tolist()
    ended: list[int] = []
    found: list[list[int]] = [[] for _ in range(6)]
    stream = generator.stream(prompts * 2, max_tokens=12, stop_when=ends_at(whole, (2, 5, 12)), on_end=ended.append)
    phases: set[str] = set()
    with listening(lambda phase: phases.add(phase.what)):
        for drawn in stream:
            found[drawn.request].append(drawn.token)
    assert {"Compiling copies of caches,", "Compiling copies of tokens,"} <= phases  # nothing is compiled in silence
    assert found == [whole[0][:2], whole[1][:5], whole[2]] * 2
    assert sorted(ended) == list(range(6))


@cache
def one_at_a_time(name: str) -> list[list[int]]:
    """The tokens of each prompt, in groups of one row."""
    alone = Generator(golden.CONFIGS[name], golden.leaves(name), batch_size=1, in_flight=1)
    return alone.tokens(PROMPTS, DRAWN)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("gemma3", (1, 1, 1)),
        ("gemma3", (2, 1, 1)),
        ("gemma3", (1, 2, 1)),
        ("gemma3", (2, 2, 1)),
        ("gemma3", (2, 1, 2)),
        ("gpt2", (1, 1, 1)),
        ("gpt2", (2, 2, 1)),
    ],
)
def test_tokens_are_those_of_one_prompt_at_a_time(
    name: str, layout: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, leaves = golden.CONFIGS[name], golden.leaves(name)
    whole = one_at_a_time(name)
    calls: Counter[str] = Counter()
    for method in ("begin", "replace", "advance"):
        real = getattr(Decoder, method)
        monkeypatch.setattr(Decoder, method, lambda self, *a, m=method, r=real: (calls.update([m]), r(self, *a))[1])
    generator = Generator(model, leaves, mesh=make_mesh(*layout), batch_size=2)
    found = generator.tokens(PROMPTS, DRAWN, stop_when=ends_at(whole, ENDS))
    assert found == [row[:end] for row, end in zip(whole, ENDS, strict=True)]
    assert calls["replace"] >= 2
    (decoder,) = generator._decoders.values()
    assert {*decoder.whole._forwards, *decoder.few._forwards} <= {1, 8, 16, 32}  # prompts of 1 to 20 tokens
    before = dict(calls)
    assert generator.tokens(PROMPTS, DRAWN, stop_when=ends_at(whole, ENDS)) == found
    assert calls == {method: 2 * count for method, count in before.items()}  # the same every time


def test_stopping_after_a_turn(generator: Generator) -> None:
    turns: list[int] = []

    def should_stop(turn: int) -> bool:
        turns.append(turn)
        return turn == 4

    found = generator.tokens([[1, 2], [3]], max_tokens=12, should_stop=should_stop)
    assert turns == list(range(5))
    assert [len(row) for row in found] == [3, 3]


@pytest.mark.slow
def test_caches_of_other_rows_stay_where_and_as_they_are() -> None:
    generator = Generator(golden.CONFIGS["qwen3"], golden.leaves("qwen3"), mesh=make_mesh(1, 2, 2), batch_size=4)
    caches = generator.caches([PROMPTS[0]] * 4, SamplingConfig(max_tokens=18))
    decoder = Decoder(whole=caches.whole, few=caches.few)

    def request(number: int) -> Request:
        return Request(number=number, prompt=PROMPTS[number], sampling=SamplingConfig())

    texts, rows = decoder.empty(), [request(n) for n in range(4)]
    decoder.begin(texts, beginning_fields(decoder.input, rows, 32))
    decoder.draw_by(texts, sampling_fields(rows))
    paths = list(decoder.whole.model.parameters[0].state)
    at = [i for i, path in enumerate(paths) if is_cache(path)]
    before = [np.asarray(texts.state[0][i]) for i in at]
    held = [texts.state[0][i] for i in at]
    places = [[shard.data.unsafe_buffer_pointer() for shard in array.addressable_shards] for array in held]
    decoder.replace(texts, beginning_fields(decoder.input, [request(4), None], 8), np.array([1, 2], np.int32))
    after = [texts.state[0][i] for i in at]
    assert all(array.is_deleted() for array in held)
    assert [[shard.data.unsafe_buffer_pointer() for shard in array.addressable_shards] for array in after] == places
    for old, new in zip(before, after, strict=True):
        np.testing.assert_array_equal(np.asarray(new)[[0, 2, 3]], old[[0, 2, 3]])
        assert (np.asarray(new)[1] != old[1]).any()
    assert texts.positions.tolist() == [2, 4, 0, 19]
