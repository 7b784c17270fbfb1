"""Groups as text, `PATTERN:NAME=VALUE,...`, and as flags."""

from collections.abc import Callable, Mapping
from typing import Any

import tyro


def split_group(text: str, readers: Mapping[str, Callable[[str], Any]]) -> tuple[str, dict[str, Any]]:
    """The pattern, and the values by name, each as its reader returns it. Raises `ValueError` for another text."""
    pattern, colon, rest = text.rpartition(":")
    if not colon:
        raise ValueError(text)
    found: dict[str, Any] = {}
    for part in rest.split(","):
        name, equals, value = (word.strip() for word in part.partition("="))
        name = name.replace("-", "_")
        if not equals or name not in readers or name in found:
            raise ValueError(text)
        found[name] = readers[name](value)
    return pattern, found


def group_argument(kind: type) -> Any:
    """How tyro takes a group of this class, or its text, which is read later: tyro would not show what is wrong."""
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATTERN:NAME=VALUE,...",
        instance_from_str=lambda texts: texts[0],
        is_instance=lambda value: isinstance(value, kind | str),
        str_from_instance=lambda group: [str(group)],
    )
