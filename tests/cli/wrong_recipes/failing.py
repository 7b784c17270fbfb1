"""Layers that fail, and named outputs that are not as they must be."""

from dataclasses import dataclass, replace

from meshpipe import Config, named
from tests import tiny_recipes


def lookup(x):
    return {"features": x}["labels"]


@dataclass(frozen=True, kw_only=True)
class Failing(tiny_recipes.DenseConfig):
    def layers(self):
        return [*super().layers(), lookup]


@dataclass(frozen=True, kw_only=True)
class Unbuilt(tiny_recipes.DenseConfig):
    def layers(self):
        return [lambda rngs: 1 / 0] * 4


@dataclass(frozen=True, kw_only=True)
class Unread(tiny_recipes.DenseConfig):
    def layers(self):
        return [named("memory", layer) if i == 1 else layer for i, layer in enumerate(super().layers())]


@dataclass(frozen=True, kw_only=True)
class Early(tiny_recipes.DenseConfig):
    def layers(self):
        return [*super().layers(), lambda x, memory: x + memory, named("memory", lambda x: x), lambda x, memory: x]


@dataclass(frozen=True, kw_only=True)
class Asking(tiny_recipes.DenseConfig):
    def loss(self, output, batch, memory):
        return super().loss(output, batch)


def unread() -> Config:
    return replace(tiny_recipes.pipeline(), model=Unread())


def early() -> Config:
    return replace(tiny_recipes.pipeline(), model=Early())


def asking() -> Config:
    return replace(tiny_recipes.pipeline(), model=Asking())


def fails() -> Config:
    return replace(tiny_recipes.pipeline(), model=Failing())


def unbuilt() -> Config:
    return replace(tiny_recipes.pipeline(), model=Unbuilt())
