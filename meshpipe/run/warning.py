"""What a run says once and goes on: its reports are for people, and never end the work."""

import sys


class Warnings:
    """Sentences for standard error, each kind of them once."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def say_once(self, kind: str, sentence: str) -> None:
        if kind not in self._said:
            self._said.add(kind)
            print(f"meshpipe: {sentence}", file=sys.stderr, flush=True)
