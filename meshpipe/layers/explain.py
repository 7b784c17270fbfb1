"""Adds notes to errors that say which part of the user's model they come from, and what to do."""

import re
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax

from meshpipe.errors import advise

_LIBRARIES = re.compile(r"site-packages|dist-packages|<")
_ABOUT_SHAPES = re.compile(
    r"shape|dimension|\bndim|\bdims?\b|\brank\b|\bsizes?\b|axis \d|axes|broadcast|concatenat|contract|"
    r"not enough values|too many values|unpack",
    re.IGNORECASE,
)


@contextmanager
def call_of_layer(path: str, name: str, stage: int, value: Any, *, train: bool) -> Iterator[None]:
    """Adds a note to errors of a layer's call: the layer, and what it was called with."""
    try:
        yield
    except Exception as error:
        mode = "training" if train else "evaluation"
        text = f"This comes from {path} ({name}, stage {stage}), called with {spell(value)} in {mode}."
        advise(error, f"{text}{_way_out(error)}")
        raise


@contextmanager
def call_of_loss(name: str, value: Any, batch: Mapping[str, Any]) -> Iterator[None]:
    """Adds a note to errors of the loss or the metrics: which of them, and what it was called with."""
    try:
        yield
    except Exception as error:
        text = (
            f"This comes from the {name}, called with the output of the last layer, {spell(value)}, and a microbatch "
            f"with {spell(dict(batch))}."
        )
        advise(error, f"{text}{_way_out(error, of_layer=False)}")
        raise


def spell(value: Any) -> str:
    """The dtypes and shapes of a pytree."""

    def leaf(part: Any) -> str:
        return f"{part.dtype}{list(part.shape)}" if hasattr(part, "shape") else type(part).__name__

    shapes = jax.tree.map(leaf, value)
    return shapes if isinstance(shapes, str) else str(shapes).replace("'", "")


def _way_out(error: Exception, *, of_layer: bool = True) -> str:
    text = str(error)
    if isinstance(error, NameError) and "unbound axis name" in text:
        return (
            " Leave axis_name out: a layer sees the whole microbatch, over all devices of the data axis, so its means "
            "and statistics are those of the whole microbatch."
        )
    if "AxisType.Auto" in text or "of type Auto" in text:
        return (
            " Leave out_sharding out: the mesh axes of a stage are Auto, and XLA places what layers compute. Name the "
            "axes of parameters with nnx.with_partitioning, and constrain a value with "
            "jax.lax.with_sharding_constraint where that is needed."
        )
    if isinstance(error, jax.errors.UnexpectedTracerError) or type(error).__name__ == "TraceContextError":
        return " A call may only change what belongs to its own module, and what it is given."
    if isinstance(error, jax.errors.JAXTypeError):
        return (
            " Calls are traced: arrays have shapes and no values. Use jnp.where or jax.lax.cond in place of if, and "
            "keep arrays as arrays, without float, int, bool or numpy."
        )
    if of_layer and isinstance(error, TypeError | ValueError) and _is_of_library(error) and _ABOUT_SHAPES.search(text):
        return " Each layer must take what the one before returns, and the first one the field `input` of the batch."
    return ""


def _is_of_library(error: Exception) -> bool:
    """Whether a library raised it, and not a line of the user's."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and _LIBRARIES.search(frames[-1].filename) is not None
