"""Which adapters a run trains."""

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import jax.numpy as jnp

from meshpipe.adapters.groups import Groups, LoraGroup, as_groups
from meshpipe.errors import ArgumentError, check_number, check_positive, check_whole


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Adapters of low rank (LoRA, arXiv 2106.09685) on the linear parts of a model, which stay as they are."""

    rank: int = 0
    """Rank of the adapters; 0 has none, and trains the model itself."""
    alpha: float = 16.0
    """Scale of the adapters, divided by their rank."""
    targets: tuple[str, ...] | None = None
    """Patterns of paths of modules that get an adapter, or of the ends of paths: query, 'layers/3/*'. One that begins
    with ! leaves modules out. None is every linear module, and no embedding."""
    dropout: float = 0.0
    """Rate at which inputs of adapters are dropped in training."""
    rank_stabilised: bool = False
    """Whether alpha is divided by the square root of the rank (rsLoRA, arXiv 2312.03732)."""
    groups: Groups = ()
    """Adapters, by such patterns, with a rank or alpha of their own: `value:rank=16 'layers/0/*:rank=4,alpha=8'`. The
    first pattern that matches counts."""

    def __post_init__(self) -> None:
        check_whole("rank", self.rank, 0, section="lora")
        if not self.rank:
            self._check_off()
            return
        check_positive("alpha", self.alpha, section="lora")
        if not math.isfinite(self.alpha):
            raise ArgumentError(f"`alpha` must be a finite number. Got {self.alpha}.", "lora")
        check_number("dropout", self.dropout, 1, section="lora")
        object.__setattr__(self, "targets", as_targets(self.targets))
        object.__setattr__(self, "groups", as_groups(self.groups))

    def _check_off(self) -> None:
        """Raises `ArgumentError` for what a config without adapters would ignore."""
        for field in fields(self):
            value = getattr(self, field.name)
            if value != field.default:
                raise ArgumentError(
                    f"`{field.name}` is for adapters, and a `rank` of 0 has none. Got {value!r}. Give a `rank`, such "
                    "as 8, or leave it out.",
                    "lora",
                )

    def group_of(self, path: str) -> LoraGroup | None:
        """The group of the module with this path; None for the rest."""
        return next((group for group in as_groups(self.groups) if group.matches(path)), None)

    def size_of(self, path: str) -> tuple[int, float]:
        """The rank of the adapter of a module, and what the product of its factors is multiplied by."""
        group = self.group_of(path)
        rank = self.rank if group is None or group.rank is None else group.rank
        alpha = self.alpha if group is None or group.alpha is None else group.alpha
        return rank, alpha / (rank**0.5 if self.rank_stabilised else rank)


def check_rank(rank: Any) -> None:
    """Raises `ArgumentError` for a rank that no adapter has."""
    if isinstance(rank, numbers.Integral) and rank == 0:
        raise ArgumentError(
            "`rank` must be at least 1. Got 0, which is no adapter: give the layers themselves.", "lora"
        )
    check_whole("rank", rank, section="lora")


def as_targets(targets: Any) -> tuple[str, ...] | None:
    """Patterns, or None for all linear modules. Raises `ArgumentError` for what is neither, and for none of them."""
    if targets is None:
        return None
    words = targets if isinstance(targets, Sequence) and not isinstance(targets, str) else [None]
    if not all(isinstance(word, str) and word.strip("!") for word in words):
        raise ArgumentError(
            f"`targets` must be a list of patterns of paths. Got {targets!r}. Write e.g. targets=['query', 'value'].",
            "lora",
        )
    if all(word.startswith("!") for word in targets):
        which = "which only leave out. Add '*' before them." if targets else "which names nothing."
        raise ArgumentError(
            f"One of `targets` must say what gets an adapter. Got {list(targets)}, {which} Without `targets`, every "
            "linear module gets one.",
            "lora",
        )
    return tuple(words)


def floating_dtype(given: Any) -> Any:
    """The dtype of adapters. Raises `ArgumentError` for one in which no gradient step can be taken."""
    try:
        dtype = None if given is None else jnp.dtype(given)
    except (TypeError, ValueError):  # a text that is no dtype
        dtype = None
    if dtype is None or not jnp.issubdtype(dtype, jnp.inexact):
        raise ArgumentError(
            f"`param_dtype` must be a floating dtype. Got {given!r}. Pass e.g. jnp.float32 or jnp.bfloat16.", "lora"
        )
    return dtype
