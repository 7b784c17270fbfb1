"""Scores of continuations are those that the logits of `transformers` give, at every layout."""

import golden
import numpy as np
import pytest

from meshpipe import make_mesh
from meshpipe.generation.generator import Generator
from meshpipe.generation.tokenizer import ByteTokenizer, encode_pair

LAYOUTS: dict[str, tuple[int, int, int]] = {
    "single": (1, 1, 1),
    "pipeline": (2, 1, 1),
    "pipeline_tensor": (2, 1, 2),
    "pipeline_data": (2, 2, 1),
}
QUICK = (("gpt2", "single"),)
TOLERANCE = 16 * golden.TOLERANCE
"""Of the sum over a text of 16 tokens."""


def cases() -> list[object]:
    every = [(name, layout) for name in golden.CONFIGS for layout in LAYOUTS]
    return [pytest.param(*case, marks=[] if case in QUICK else pytest.mark.slow) for case in every]


def expected_score(ids: np.ndarray, logits: np.ndarray, begin: int, end: int) -> tuple[float, bool]:
    """Of the tokens from `begin` to `end` after those before, from the logits of all tokens."""
    rows, tokens = logits[begin - 1 : end - 1].astype(np.float64), ids[begin:end]
    logprobs = rows - np.log(np.exp(rows).sum(axis=1, keepdims=True))
    return float(logprobs[range(len(tokens)), tokens].sum()), bool((rows.argmax(axis=1) == tokens).all())


@pytest.mark.parametrize(("name", "layout"), cases())
def test_scores_are_those_of_full_logits(name: str, layout: str) -> None:
    golden_arrays = golden.expected(name)
    ids, logits = golden_arrays["ids"], golden_arrays["logits"]
    # Contexts and continuations of several lengths, of which one has no tokens.
    ends = [(row, begin, end) for row in range(len(ids)) for begin, end in ((1, 16), (12, 13), (4, 4), (3, 16))]
    generator = Generator(golden.CONFIGS[name], golden.leaves(name), mesh=make_mesh(*LAYOUTS[layout]), batch_size=3)
    found = generator.scorer.tokens(
        [(ids[row, :begin].tolist(), ids[row, begin:end].tolist()) for row, begin, end in ends]
    )
    wanted = [expected_score(ids[row], logits[row], begin, end) for row, begin, end in ends]
    np.testing.assert_allclose([s.logprob for s in found], [w[0] for w in wanted], rtol=0, atol=TOLERANCE)
    assert [s.is_greedy for s in found] == [w[1] for w in wanted]
    # What the model itself goes on with is greedy, and no longer once its last token is another.
    written = golden_arrays["continuation"]
    prompts = [row[:length].tolist() for row, length in zip(ids, golden_arrays["prompt_lengths"], strict=True)]
    best = [score.is_greedy for score in generator.scorer.tokens(list(zip(prompts, written.tolist(), strict=True)))]
    assert best == [True] * len(prompts)
    written[:, -1] ^= 1
    best = [score.is_greedy for score in generator.scorer.tokens(list(zip(prompts, written.tolist(), strict=True)))]
    assert best == [False] * len(prompts)


def test_what_cannot_be_scored_says_so() -> None:
    generator = Generator(golden.CONFIGS["gpt2"], golden.leaves("gpt2"))
    wrong = {
        "at least one token. Got none in text 1": [([1], [2]), ([], [2])],
        "one of the model's 288. Got 288 in text 0": [([1], [288])],
        "one of the model's 288. Got -1 in text 0": [([-1, 3], [2])],
        "64 positions of the model, but for its last token. Got 65": [([1] * 60, [1] * 6)],
    }
    for message, pairs in wrong.items():
        with pytest.raises(ValueError, match=message):
            generator.scorer.tokens(pairs)
    with pytest.raises(ValueError, match="needs a tokenizer"):
        generator.score([("a", "b")])


def test_a_space_belongs_to_the_continuation() -> None:
    assert encode_pair(ByteTokenizer(), "a b ", "c") == (list(b"a b"), list(b" c"))
    assert encode_pair(ByteTokenizer(), "  ", "c") == (list(b"  "), list(b"c"))
