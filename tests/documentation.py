"""The pages of the documentation, and what their lines are."""

import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md")), ROOT / "recipes" / "README.md"]
FENCE = re.compile(r"^\s*```(\w*)")


def fenced_lines(text: str) -> Iterator[tuple[str | None, str]]:
    """Every line with the language of the block that it stands in; None outside of blocks and for the fences."""
    language = None
    for line in text.splitlines():
        fence = FENCE.match(line)
        yield (None if fence else language), line
        if fence:
            language = fence[1] if language is None else None


def prose(text: str) -> str:
    return "\n".join(line for language, line in fenced_lines(text) if language is None)
