"""Which adapters a run trains."""

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from meshpipe.errors import ArgumentError, check_number, check_positive, check_whole


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Adapters of low rank (LoRA, arXiv 2106.09685) on the linear parts of a model, which stay as they are."""

    rank: int = 0
    """Rank of the adapters; 0 has none, and trains the model itself."""
    alpha: float = 16.0
    """Scale of the adapters, divided by their rank."""
    targets: tuple[str, ...] = ()
    """Patterns of paths of modules that get an adapter, or of the ends of paths: query, 'layers/3/*'. One that begins
    with ! leaves modules out. By default every linear module, and no embedding."""
    dropout: float = 0.0
    """Rate at which inputs of adapters are dropped in training."""
    rank_stabilised: bool = False
    """Whether alpha is divided by the square root of the rank (rsLoRA, arXiv 2312.03732)."""

    def __post_init__(self) -> None:
        check_whole("rank", self.rank, 0, section="lora")
        if self.rank:
            check_lora(self.rank, self.alpha, self.targets, self.dropout)
        elif changed := [name for name, value in LORA_OFF.items() if getattr(self, name) != value]:
            raise ArgumentError(
                f"`{changed[0]}` is for adapters, and a `rank` of 0 has none. Got {getattr(self, changed[0])!r}. "
                "Give a `rank`, such as 8, or leave it out.",
                "lora",
            )


LORA_OFF: dict[str, Any] = {"alpha": 16.0, "targets": (), "dropout": 0.0, "rank_stabilised": False}


def check_lora(rank: Any, alpha: Any, targets: Any, dropout: Any) -> None:
    """Raises `ArgumentError` for values that no adapters have."""
    if isinstance(rank, numbers.Integral) and rank == 0:
        raise ArgumentError(
            "`rank` must be at least 1. Got 0, which is no adapter: give the layers themselves.", "lora"
        )
    check_whole("rank", rank, section="lora")
    check_positive("alpha", alpha, section="lora")
    if not math.isfinite(alpha):
        raise ArgumentError(f"`alpha` must be a finite number. Got {alpha}.", "lora")
    check_number("dropout", dropout, 1, section="lora")
    words: Sequence[Any] = targets if isinstance(targets, Sequence) and not isinstance(targets, str) else [None]
    if not all(isinstance(word, str) and word.strip("!") for word in words):
        raise ArgumentError(
            f"`targets` must be a list of patterns of paths. Got {targets!r}. Write e.g. targets=['query', 'value'].",
            "lora",
        )
    if words and all(word.startswith("!") for word in words):
        raise ArgumentError(
            f"One of `targets` must say what gets an adapter. Got {targets!r}, which only leave out. "
            "Add '*' before them.",
            "lora",
        )


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
