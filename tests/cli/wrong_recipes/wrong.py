"""Models and data that return what they must not."""

from dataclasses import dataclass, replace

import numpy as np

from meshpipe import Config
from tests.tiny_recipes import DenseConfig, Points, PointsConfig, pipeline


class Numbers(Points):
    def __getitem__(self, index):
        return 3


class NoNames(Points):
    def __getitem__(self, index):
        return {3: np.zeros(8)}


class Endless(Points):
    def __len__(self):
        return 10**30


@dataclass(frozen=True, kw_only=True)
class WrongData(PointsConfig):
    kind: int = 0

    def train_source(self):
        return [lambda *a: 3, Numbers, NoNames, Endless][self.kind](512, 8)


@dataclass(frozen=True, kw_only=True)
class WrongLayers(DenseConfig):
    def layers(self):
        return 3


@dataclass(frozen=True, kw_only=True)
class WrongTied(DenseConfig):
    def tied(self):
        return 3


def layers() -> Config:
    return replace(pipeline(), model=WrongLayers())


def tied() -> Config:
    return replace(pipeline(), model=WrongTied())


def source() -> Config:
    return replace(pipeline(), data=WrongData())
