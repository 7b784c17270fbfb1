"""Makes the paths of leaves by joining the keys that lead to them: `layers/3/attention/query/kernel`."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

import jax

_ESCAPED = re.compile("/|%(?=25|2F)")
"""What could be mistaken for a separator or an escape sequence. A `%` anywhere else stays as it is."""


def join(parent: str, key: Sequence[Any]) -> str:
    """The path of a leaf below `parent`.

    Different sequences of keys have different paths, except that the integer `1` and the string `"1"` are equal.
    """
    return "/".join((parent, *map(_component, key)))


def _component(key: Any) -> str:
    return _ESCAPED.sub(lambda found: "%2F" if found[0] == "/" else "%25", str(key))


def check_distinct(paths: Iterable[str], what: str) -> None:
    """Raises `ValueError` when two leaves have one path."""
    seen: set[str] = set()
    for path in paths:
        if path in seen:
            raise ValueError(
                f"Every leaf must have a path of its own. Two {what} have the path {path}. "
                "Use keys that are still different as text (1 and '1' are not)."
            )
        seen.add(path)


def by_path(tree: Any, known: Iterable[str] = ()) -> dict[str, Any]:
    """The leaves of a pytree by path, e.g. `0/mu/layers/3/kernel`. Keys that are `known` are paths already.

    Raises `ValueError` when two leaves have one path.
    """
    paths = frozenset(known)
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    named = [("/".join(_part(key, paths) for key in keys), leaf) for keys, leaf in leaves]
    check_distinct((path for path, _ in named), "leaves of the optimizer's state")
    return dict(named)


def _part(key: Any, known: frozenset[str]) -> str:
    name = jax.tree_util.keystr((key,), simple=True)
    return name if name in known else _component(name)
