"""Warnings of a run, each printed once; they never end the run."""

import sys


class Warnings:
    """Prints to standard error, once per kind of warning."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def say_once(self, kind: str, sentence: str) -> None:
        if kind not in self._said:
            self._said.add(kind)
            print(f"meshpipe: {sentence}", file=sys.stderr, flush=True)
