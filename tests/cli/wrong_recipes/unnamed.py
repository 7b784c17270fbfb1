"""Data and a model of which a checkpoint could not say what they are."""

from dataclasses import dataclass, replace
from typing import Any

import tyro

from meshpipe import Config
from tests.tiny_recipes import DenseConfig, PointsConfig, pipeline

NAMELESS = object()


class Unnamed:
    def __init__(self, source):
        self.source = source

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        return self.source[index]


@dataclass(frozen=True, kw_only=True)
class UnnamedData(PointsConfig):
    def train_source(self):
        return Unnamed(super().train_source())


@dataclass(frozen=True, kw_only=True)
class ObjectModel(DenseConfig):
    extra: tyro.conf.Suppress[Any] = NAMELESS


def data() -> Config:
    return replace(pipeline(), data=UnnamedData())


def model() -> Config:
    return replace(pipeline(), model=ObjectModel())
