"""Recipes that are different in process 1 than in process 0."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import tiny_recipes

from meshpipe.config import Config
from meshpipe.processes.coordination import process_index


@dataclass(frozen=True)
class Hanging(tiny_recipes.Points):
    """A source that blocks in process 1 after a while."""

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        if process_index() == 1 and index % 16 == 7:
            time.sleep(1000)
        return super().__getitem__(index)


@dataclass(frozen=True, kw_only=True)
class HangingConfig(tiny_recipes.PointsConfig):
    def train_source(self) -> tiny_recipes.Points:
        return Hanging(self.count, self.width)


@dataclass(frozen=True, kw_only=True)
class RefusingConfig(tiny_recipes.PointsConfig):
    def eval_source(self) -> tiny_recipes.Points:
        if process_index() == 1:
            raise ValueError("no such file on this machine: held_out.txt")
        return super().eval_source()


def hangs() -> Config:
    """Process 1 stops reading its data."""
    return replace(tiny_recipes.pipeline(), data=HangingConfig(), steps=1000, eval_batches=0)


def refuses() -> Config:
    """Process 1 has no held-out data."""
    return replace(tiny_recipes.pipeline(), data=RefusingConfig())
