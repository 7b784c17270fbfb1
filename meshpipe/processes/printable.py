"""Text of other processes as it may be printed."""

import re

MOST_CHARACTERS = 4000
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def printable(text: str, most: int = MOST_CHARACTERS) -> str:
    """The text with every character escaped that could move a terminal's cursor, hide text or turn its direction.

    Lines and tabs stay. What is longer than `most` characters is cut, and says so.
    """
    cut = len(text) - most
    if cut > 0:
        text = f"{text[:most]}... ({cut} more characters)"
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
