"""Text from other processes, made safe to print."""

import re

MAX_CHARACTERS = 4000
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def printable(text: str, most: int = MAX_CHARACTERS) -> str:
    """Escapes every character that could move a terminal's cursor, hide text or reverse its direction.

    Line breaks and tabs stay. A text longer than `most` characters is cut, and ends with the number of those left out.
    """
    cut = len(text) - most
    if cut > 0:
        text = f"{text[:most]}... ({cut} more characters)"
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
