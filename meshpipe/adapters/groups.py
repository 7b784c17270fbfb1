"""Groups of adapters with a rank or a scale of their own, by patterns of the paths of their modules."""

import math
from dataclasses import dataclass
from typing import Annotated, Any

from meshpipe.adapters.patterns import matches
from meshpipe.errors import ArgumentError, is_number
from meshpipe.optimizer.group_text import group_argument, split_group


@dataclass(frozen=True, kw_only=True)
class LoraGroup:
    """Adapters with a rank or alpha of their own. What is None is that of the others."""

    pattern: str
    """Pattern of the paths of modules, or of their ends: `layers/0/*`, or `value`."""
    rank: int | None = None
    """Rank of these adapters."""
    alpha: float | None = None
    """Scale of these adapters, divided by their rank."""

    def __post_init__(self) -> None:
        if not isinstance(self.pattern, str) or not self.pattern:
            raise _wrong(f"A group of `groups` needs a pattern of paths of modules. Got {self.pattern!r}.")
        if self.rank is None and self.alpha is None:
            raise _wrong(
                f"A group of `groups` must differ from the rest in rank or alpha. Got {self.pattern!r} without any. "
                f"Write e.g. '{self.pattern}:rank=16'."
            )
        if self.rank is not None and (type(self.rank) is not int or self.rank < 1):
            raise _wrong(
                "The rank of a group of `groups` must be a whole number of at least 1. "
                f"Got {self.rank!r} for {self.pattern!r}. `targets` leaves modules out."
            )
        if self.alpha is not None and not (is_number(self.alpha) and 0 < self.alpha < math.inf):
            raise _wrong(
                f"The alpha of a group of `groups` must be a number above 0. Got {self.alpha!r} for {self.pattern!r}."
            )

    @classmethod
    def parse(cls, text: str) -> "LoraGroup":
        """A group from its text: `layers/0/*:rank=4,alpha=8`. Raises `ArgumentError` for a text that is none."""
        try:
            pattern, found = split_group(text, {"rank": int, "alpha": float})
        except ValueError:
            raise _not_a_group(text) from None
        return cls(pattern=pattern, **found)

    def __str__(self) -> str:
        values = {"rank": self.rank, "alpha": self.alpha}
        own = ",".join(f"{name}={spell(value)}" for name, value in values.items() if value is not None)
        return f"{self.pattern}:{own}"

    def matches(self, path: str) -> bool:
        """Whether the module with this path is one of the group, unless a group before it has it."""
        return matches(path, self.pattern)


Groups = tuple[Annotated[LoraGroup | str, group_argument(LoraGroup)], ...]


def as_groups(given: Any) -> tuple[LoraGroup, ...]:
    """Groups, of which some may be texts. Raises `ArgumentError` for anything else."""
    if not isinstance(given, list | tuple) or not all(isinstance(group, LoraGroup | str) for group in given):
        raise _wrong(f"`groups` must be a tuple of meshpipe.LoraGroup, or of texts. Got {given!r:.80}.")
    return tuple(LoraGroup.parse(group) if isinstance(group, str) else group for group in given)


def spell(number: int | float) -> str:
    """The shortest text that reads as the same number."""
    return f"{number:g}" if float(f"{number:g}") == number else repr(number)


def _not_a_group(text: str) -> ArgumentError:
    return _wrong(
        "A group of `groups` must be a pattern, a colon and what is its own: rank or alpha. "
        f"Got {text!r}. Write e.g. 'value:rank=16,alpha=32'."
    )


def _wrong(text: str) -> ArgumentError:
    return ArgumentError(text, "lora")
