"""Text from another process cannot move the cursor of this one's terminal."""

import pytest

from meshpipe.processes.printable import printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("RuntimeError: größer\n\t99 %", "RuntimeError: größer\n\t99 %"),
        ("\x1b[2J\x1b]0;title\x07", r"\x1b[2J\x1b]0;title\x07"),
        ("a\rb\x08\x7f\x9b31m", r"a\rb\x08\x7f\x9b31m"),
        ("x\u202egnp\u2028", r"x\u202egnp\u2028"),
    ],
)
def test_control_characters_are_escaped(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_a_long_text_is_cut_with_a_note() -> None:
    assert printable("a" * 25, most=5) == "aaaaa... (20 more characters)"
