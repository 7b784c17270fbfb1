"""Patterns of leaf paths."""

from fnmatch import fnmatchcase

ANCHOR = "layers/"


def matches(pattern: str, path: str) -> bool:
    """Whether a pattern, as of `fnmatch`, matches a leaf path, or a part of one that whole components make.

    A pattern that begins with `layers/` begins where the path does: `layers/3` is all of a layer, `bias` every bias,
    `attention/*` what attentions hold.
    """
    before = "/" if pattern.startswith(ANCHOR) else "*/"
    return fnmatchcase(f"/{path}/", f"{before}{pattern}/*")
