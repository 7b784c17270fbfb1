"""Errors about the caller's input, named as the caller knows it: arguments in the library, flags on the command line.

The same check serves both callers.
"""

import math
import numbers
import operator
import re
from collections.abc import Iterator
from contextlib import contextmanager

_NAME = re.compile(r"`([a-z_][a-z0-9_]*(?:\.[a-z_][a-z0-9_]*)?)`")
_caller = {"writes flags": False}

SEED_LIMIT = 2**32
"""Seeds must be below this: JAX drops higher bits, so two larger seeds could be equal."""


class ArgumentError(ValueError):
    """A value that the caller must change.

    The message has names of arguments in backticks, such as `clip_norm`, or `mesh.data` for a nested argument; the
    command line turns them into flags. `section` is the flag prefix for names without one.
    """

    def __init__(self, message: str, section: str = "") -> None:
        super().__init__(_with_flags(message, section) if _caller["writes flags"] else message)


class Advice(str):
    """A note on an error in the user's code: its place in the model, and the remedy."""


def advise(error: BaseException, text: str) -> None:
    """Adds a note to an error, unless it already has one from closer to its origin, or is meshpipe's own."""
    if type(error).__module__.partition(".")[0] != "meshpipe" and not advice_on(error):
        error.add_note(Advice(text))


def advice_on(error: BaseException) -> list[str]:
    return [note for note in getattr(error, "__notes__", ()) if isinstance(note, Advice)]


def is_for_the_user(error: BaseException) -> bool:
    """Whether the user must change something; then the message suffices, and no traceback is needed."""
    return isinstance(error, ValueError) or bool(advice_on(error))


@contextmanager
def errors_name_flags(flags: bool = True) -> Iterator[None]:
    """While entered, errors in the whole process name flags, or arguments."""
    before, _caller["writes flags"] = _caller["writes flags"], flags
    try:
        yield
    finally:
        _caller["writes flags"] = before


def _with_flags(message: str, section: str) -> str:
    def flag(match: re.Match[str]) -> str:
        name = match[1] if "." in match[1] or not section else f"{section}.{match[1]}"
        return f"--{name.replace('_', '-')}"

    return _NAME.sub(flag, message)


def check_whole(name: str, value: object, least: int = 1, below: int | None = None, *, section: str = "") -> None:
    """Raises `ArgumentError` unless the value is a whole number, at least `least`, and below `below`."""
    rule = f"at least {least}" if below is None else f"at least {least} and below {below}"
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise ArgumentError(f"`{name}` must be a whole number of {rule}. Got {_spell(value)}.", section)
    number = operator.index(value)
    if number < least and least <= 1:
        raise ArgumentError(f"`{name}` must be at least {least}. Got {value}.", section)
    if number < least or (below is not None and number >= below):
        raise ArgumentError(f"`{name}` must be {rule}. Got {value}.", section)


def check_number(name: str, value: object, below: int | float = math.inf, *, section: str = "") -> None:
    """Raises `ArgumentError` unless the value is a finite number, at least 0, and below `below`."""
    rule = "a number of at least 0" if below == math.inf else f"a number of at least 0 and below {below:g}"
    if not is_number(value, below):
        raise ArgumentError(f"`{name}` must be {rule}. Got {_spell(value)}.", section)


def check_positive(name: str, value: object, otherwise: str = "", *, section: str = "") -> None:
    """Raises `ArgumentError` unless the value is a number above 0; `otherwise` names alternatives in the message."""
    if not _is_real(value) or not value > 0:  # type: ignore[operator]
        raise ArgumentError(f"`{name}` must be above 0{otherwise}. Got {_spell(value)}.", section)


def check_seed(seed: object) -> None:
    """Raises `ArgumentError` unless the value is an unsigned integer of 32 bits."""
    check_whole("seed", seed, 0, SEED_LIMIT)


def check_clip_norm(clip_norm: object) -> None:
    """Raises `ArgumentError` for a norm that is not above 0, with which training would stall or ascend; None means no
    clipping.
    """
    if clip_norm is not None:
        check_positive("clip_norm", clip_norm, ", or None to clip nothing")


def is_number(value: object, below: int | float = math.inf) -> bool:
    """Whether the value is a finite number, at least 0, and below `below`."""
    return _is_real(value) and bool(0 <= value < below)  # type: ignore[operator]


def _is_real(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _spell(value: object) -> str:
    return f"{value}" if _is_real(value) else f"{value!r}, {kind_of(value)}"


def kind_of(value: object) -> str:
    """The name of the value's type, with an article."""
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"
