"""Groups of parameters that are trained otherwise than the rest, by patterns of their leaf paths."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

import optax

from meshpipe.errors import ArgumentError, is_number
from meshpipe.optimizer.group_text import group_argument, split_group
from meshpipe.optimizer.patterns import matches

Kind = Literal["adamw", "sgd"]
REST = "rest"
"""The label of parameters that are in no group; the others have the number of their group."""


@dataclass(frozen=True, kw_only=True)
class ParameterGroup:
    """Parameters with a learning rate, weight decay or optimizer of their own. What is None is that of the run."""

    pattern: str
    """Pattern of leaf paths: `layers/0/*`, or `bias` for every bias."""
    learning_rate: float | None = None
    """Peak learning rate; warm-up and decay are those of the run."""
    weight_decay: float | None = None
    """Decoupled weight decay, of leaves with two or more dims."""
    optimizer: Kind | None = None
    """`adamw` or `sgd`."""

    def __post_init__(self) -> None:
        if not isinstance(self.pattern, str) or not self.pattern:
            raise ArgumentError(f"A group of `groups` needs a pattern of leaf paths. Got {self.pattern!r}.")
        if not self.changes:
            raise ArgumentError(
                "A group of `groups` must differ from the rest in learning_rate, weight_decay or optimizer. "
                f"Got {self.pattern!r} without any. Write e.g. '{self.pattern}:learning_rate=1e-4'."
            )
        for name in ("learning_rate", "weight_decay"):
            value = getattr(self, name)
            if value is not None and not is_number(value):  # the run has one of that name, so say whose it is
                raise ArgumentError(
                    f"The {name} of a group of `groups` must be a number of at least 0. "
                    f"Got {value!r} for {self.pattern!r}."
                )
        if self.optimizer not in (None, *get_args(Kind)):
            raise ArgumentError(
                "The optimizer of a group of `groups` must be adamw or sgd. "
                f"Got {self.optimizer!r} for {self.pattern!r}."
            )

    @property
    def changes(self) -> dict[str, Any]:
        """What is its own, by the name of the field of the run's optimizer."""
        named = {name: getattr(self, name) for name in ("learning_rate", "weight_decay", "optimizer")}
        return {name: value for name, value in named.items() if value is not None}

    @classmethod
    def parse(cls, text: str) -> "ParameterGroup":
        """A group from its text: `layers/0/*:learning_rate=1e-4,weight_decay=0`.

        Raises `ArgumentError` for a text that is none.
        """
        try:
            pattern, found = split_group(text, {"learning_rate": float, "weight_decay": float, "optimizer": str})
        except ValueError:
            raise _not_a_group(text) from None
        return cls(pattern=pattern, **found)

    def __str__(self) -> str:
        return f"{self.pattern}:{','.join(f'{name}={value}' for name, value in self.changes.items())}"


Groups = tuple[Annotated[ParameterGroup | str, group_argument(ParameterGroup)], ...]


def as_groups(given: Any) -> tuple[ParameterGroup, ...]:
    """Groups, of which some may be texts. Raises `ArgumentError` for anything else."""
    if not isinstance(given, list | tuple) or not all(isinstance(group, ParameterGroup | str) for group in given):
        raise ArgumentError(f"`groups` must be a tuple of meshpipe.ParameterGroup, or of texts. Got {given!r:.80}.")
    return tuple(ParameterGroup.parse(group) if isinstance(group, str) else group for group in given)


def grouped(
    groups: Sequence[ParameterGroup], transformations: Mapping[str, optax.GradientTransformation]
) -> optax.GradientTransformation:
    """Each group's transformation for its parameters: of the first group whose pattern matches, or that of the rest.

    `transformations` has those of the groups under their numbers, and that of the rest under `REST`.
    """

    def labels(params: Mapping[str, Any]) -> dict[str, str]:
        return {path: group_of(groups, path) for path in params}

    return optax.partition(transformations, labels)


def group_of(groups: Sequence[ParameterGroup], path: str) -> str:
    """The label of a parameter."""
    return next((str(number) for number, group in enumerate(groups) if matches(group.pattern, path)), REST)


def check_groups(groups: Sequence[ParameterGroup], paths: Iterable[str]) -> None:
    """Raises `ArgumentError` for a group that gets none of the parameters that are trained, whose paths these are."""
    known = list(paths)
    used = {group_of(groups, path) for path in known}
    for number, group in enumerate(groups):
        if str(number) not in used:
            taken = any(matches(group.pattern, path) for path in known)
            found = "groups before it have all that it matches" if taken else "it matches none"
            some = ", ".join(known[:3])
            raise ArgumentError(
                f"A group of `groups` must get a parameter that is trained. Got {group.pattern!r}: {found}. "
                f"Trained are {some}{f' and {len(known) - 3} more' if len(known) > 3 else ''}."
            )


def _not_a_group(text: str) -> ArgumentError:
    return ArgumentError(
        "A group of `groups` is a pattern of leaf paths and what its parameters have of their own: "
        f"'layers/0/*:learning_rate=1e-4,weight_decay=0,optimizer=sgd'. Got {text!r}."
    )
