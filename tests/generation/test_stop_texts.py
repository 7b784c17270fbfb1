"""A text ends before the first stop text, and nothing of one is shown while it is generated."""

import pytest

from meshpipe.cli.prompts import Prompt
from meshpipe.cli.written_texts import WrittenTexts
from meshpipe.generation.stop_texts import StopTexts
from meshpipe.generation.tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer()


def streamed(text: str, stops: tuple[str, ...]) -> tuple[list[str], int]:
    """What is written of a text that comes byte by byte until it has ended, and the bytes that came."""
    found: list[str] = []
    ends = StopTexts(TOKENIZER, stops)
    written = WrittenTexts(
        [Prompt("> ")], lambda number, tokens: TOKENIZER.decode(tokens), ends, as_json=False, write=found.append
    )
    tokens: list[int] = []
    for token in TOKENIZER.encode(text):
        tokens.append(token)
        written.add(0, token)
        if ends.is_in(tokens):
            break
    written.finish()
    return found, len(tokens)


@pytest.mark.parametrize(
    ("text", "stops", "expected", "count"),
    [
        ("one two", (), "one two", 7),
        ("one two\n\nthree", ("\n\n",), "one two", 9),
        ("one\ntwo\n", ("\n\n",), "one\ntwo\n", 8),
        ("x" * 300 + "END, and more", ("END", "more"), "x" * 300, 303),
        ("aaab", ("aab",), "a", 4),
        ("é à ü", ("à",), "é ", 5),
        ("STOP", ("STOP",), "", 4),
    ],
)
def test_stops(text: str, stops: tuple[str, ...], expected: str, count: int) -> None:
    found, came = streamed(text, stops)
    assert "".join(found) == f"> {expected}\n"
    assert came == count


def test_nothing_is_shown_that_may_be_cut() -> None:
    found, _ = streamed("wait: EN, END", ("END",))
    assert "".join(found) == "> wait: EN, \n"
    assert not any(part.endswith(("E", "EN")) for part in found)


def test_an_empty_stop_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one character"):
        StopTexts(TOKENIZER, ("a", ""))
