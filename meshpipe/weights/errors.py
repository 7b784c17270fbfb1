"""What is wrong with a folder of weights."""

from collections.abc import Sequence

MOST_NAMES = 8
"""Names that a message lists; of more, it says how many."""


class WeightsError(ValueError):
    """A folder of weights cannot be read as what it should be."""


def listed(names: Sequence[str], most: int = MOST_NAMES) -> str:
    """Names as text, the first ones of many."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")
