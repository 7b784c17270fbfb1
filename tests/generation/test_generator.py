"""Published models write what `transformers` writes with the same weights, at every layout."""

import golden
import numpy as np
import pytest

from meshpipe import make_mesh
from meshpipe.generation.generator import Generator, _ends
from meshpipe.generation.saved import open_saved

LAYOUTS: dict[str, tuple[int, int, int]] = {
    "single": (1, 1, 1),
    "pipeline": (2, 1, 1),
    "pipeline_tensor": (2, 1, 2),
    "pipeline_data": (2, 2, 1),
}
QUICK = (("gpt2", "single"),)


def prompts(name: str) -> list[list[int]]:
    """The golden prompts, which are of different lengths."""
    expected = golden.expected(name)
    return [row[:length].tolist() for row, length in zip(expected["ids"], expected["prompt_lengths"], strict=True)]


def cases() -> list[object]:
    every = [(name, layout) for name in golden.CONFIGS for layout in LAYOUTS]
    return [pytest.param(*case, marks=[] if case in QUICK else pytest.mark.slow) for case in every]


@pytest.mark.parametrize(("name", "layout"), cases())
def test_greedy_tokens_are_those_of_transformers(name: str, layout: str) -> None:
    expected = golden.expected(name)["continuation"]
    weights = {path: np.array(value) for path, value in golden.leaves(name).items()}
    generator = Generator(golden.CONFIGS[name], weights, mesh=make_mesh(*LAYOUTS[layout]))
    for value in weights.values():  # the memory is the caller's again
        value[...] = np.nan
    found = generator.tokens(prompts(name), max_tokens=expected.shape[1])
    np.testing.assert_array_equal(found, expected)
    # The first text ends by a function of its tokens, and the others go on.
    end = expected[0, :2].tolist()
    ended = generator.tokens(prompts(name), max_tokens=expected.shape[1], stop_when=lambda tokens: tokens == end)
    assert ended == [row[:2] if row[:2] == end else row for row in expected.tolist()]


def test_caches_that_do_not_fit_are_refused_before_anything_is_compiled() -> None:
    generator = Generator(golden.CONFIGS["llama3"], golden.leaves("llama3"), mesh=make_mesh(2, 1, 2), batch_size=4096)
    asked = r"Got 8192 texts of up to 3 \+ 16000000 tokens \(prompt and `max_tokens`\)"
    with pytest.raises(ValueError, match=rf"{asked}: they need .* TB, and .* are free. Lower `max_tokens`, `batch_s"):
        generator.tokens([[1, 2, 3]] * 9000, max_tokens=16_000_000)


def test_texts_longer_than_a_model_is_for() -> None:
    """Learned positions end; rotary ones go on, beyond what config.json says."""
    generator = Generator(golden.CONFIGS["gpt2"], golden.leaves("gpt2"))
    with pytest.raises(ValueError, match=r"fit into the 64 positions of the model. Got a prompt of 60 tokens"):
        generator.tokens([[1] * 60], max_tokens=5)
    with pytest.raises(ValueError, match=r"`stop_tokens` must be tokens of the model, 0 to 287\. Got 288"):
        generator.tokens([[1]], stop_tokens=(3, 288))
    with pytest.raises(ValueError, match=r"`ends` must be a tuple of tokens\. Got an int"):
        _ends(3, None)  # where nothing checks the types of arguments
    saved = open_saved(golden.FOLDER / "llama3")
    assert saved.beyond(64) == open_saved(golden.FOLDER / "gpt2").beyond(65) == ""
    assert saved.beyond(65).startswith("The model is for texts of at most 64 tokens (max_position_embeddings")
    assert open_saved(golden.FOLDER / "qwen3_yarn").longest_text == 64
