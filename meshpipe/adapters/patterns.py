"""Patterns of the paths of modules."""

from fnmatch import fnmatchcase


def matches(path: str, pattern: str) -> bool:
    """Whether a pattern is one of a whole path, or of its last parts: `query` matches `layers/1/attention/query`."""
    return fnmatchcase(path, pattern) or fnmatchcase(path, f"*/{pattern}")
