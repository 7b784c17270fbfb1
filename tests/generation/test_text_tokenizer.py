"""Text becomes tokens and back, as it is continued."""

from pathlib import Path

import pytest

from meshpipe.errors import ArgumentError
from meshpipe.generation.requests import tokens_of
from meshpipe.generation.tokenizer import ByteTokenizer, decode_after


def test_the_space_between_a_prompt_and_what_follows(tmp_path: Path) -> None:
    """Tokenizers like Llama's drop the space in front of a text."""
    tokenizers = pytest.importorskip("tokenizers")
    from meshpipe.data.tokenizer import Tokenizer

    vocab = {word: n for n, word in enumerate(("\u2581France", "\u2581is", "\u2581Paris", "<s>"))}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<s>"))
    made.decoder = tokenizers.decoders.Metaspace()
    made.add_special_tokens(["<s>"])
    made.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.decode([2]) == "Paris"
    assert decode_after(tokenizer, [0, 1], [2]) == " Paris"
    assert decode_after(tokenizer, [3], [2]) == "Paris"  # nothing is before it


def test_a_character_that_a_prompt_begins() -> None:
    prompt, rest = "\u00e9".encode()
    assert decode_after(ByteTokenizer(), [97, prompt], [rest, 98]) == "\ufffdb"
    assert decode_after(ByteTokenizer(), [97], [98]) == "b"


def test_what_is_no_text_and_no_prompt() -> None:
    with pytest.raises(ArgumentError, match="must be one that UTF-8 can hold"):
        ByteTokenizer().encode("a\udcff")
    for wrong in ("text", 7):
        with pytest.raises(ArgumentError, match=r"A prompt must be a list of tokens\. Got (a str|an int) as prompt 2"):
            tokens_of(wrong, 2)
