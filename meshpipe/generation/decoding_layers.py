"""The layers of a language model in generation: attention keeps what it has seen, and the last layer draws a token."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from meshpipe.errors import ArgumentError, kind_of
from meshpipe.generation.sampling import sample
from meshpipe.layers.constructors import Make, constructor_of
from meshpipe.layers.fields import LayerCall, call
from meshpipe.layers.layer import LayerLike
from meshpipe.models.transformer import Attention

SAMPLING_FIELDS = ("seed", "request", "temperature", "top_k", "top_p")
"""The batch fields, a number for each text, that say how its next token is drawn."""


@dataclass(frozen=True)
class CachingConstructor:
    """Makes the module of a layer, and gives its attentions caches for `batch` texts of up to `length` positions."""

    make: Make
    batch: int
    length: int

    def __call__(self, rngs: nnx.Rngs) -> nnx.Module:
        module = self.make(rngs)
        for _, part in nnx.iter_modules(module, graph=True):
            if isinstance(part, Attention):
                part.open_cache(self.batch, self.length)
        return module


def decoding_layers(layers: Sequence[LayerLike], batch: int, length: int) -> list[LayerLike]:
    """The layers with caches, of which the last gives a token for each text, int32 `[batch]`, in place of logits.

    Leaves keep their paths; those of caches are `cache/keys` and `cache/values` below their attention. Batch fields:
    that of the first layer, and `positions`, int32 `[batch, seq]`: either the beginning of a text, from position 0 on,
    of which the last is repeated to the end of the row, or the next position alone. Besides them those of
    `SAMPLING_FIELDS`, `[batch]`. Raises `ArgumentError` for layers that are called in ways of their own.
    """
    made = with_constructors(layers, lambda make: CachingConstructor(make, batch, length), "which can have a cache")
    return with_last_call(made, _next_tokens, "generate")


def with_constructors(layers: Sequence[LayerLike], changed: Callable[[Make], Any], why: str) -> list[LayerLike]:
    """The layers with other constructors of their modules; functions stay. Raises `ArgumentError`, which says `why`,
    for a module.
    """
    made: list[LayerLike] = []
    for index, entry in enumerate(layers):
        given = entry.layer if isinstance(entry, LayerCall) else entry
        if isinstance(given, nnx.Module):
            raise ArgumentError(
                f"To generate, every layer must be a constructor, {why}. Got {kind_of(given)} as layers/{index}. Write "
                "functools.partial(Class, ...)."
            )
        make, function = constructor_of(f"layers/{index}", given)
        new: Any = given if function is not None else changed(make)
        made.append(replace(entry, layer=new) if isinstance(entry, LayerCall) else new)
    return made


def with_last_call(layers: Sequence[LayerLike], function: Callable[..., Any], what: str) -> list[LayerLike]:
    """The layers, of which the last is called by `function` in place of a call of its own.

    Raises `ArgumentError`, which says that it is in order to `what`, for a last layer that has a call of its own.
    """
    last = layers[-1]
    if isinstance(last, LayerCall) and (last.function is not None or last.fields or last.input or last.name):
        raise ArgumentError(
            f"To {what}, the last layer must be called with the output of the one before it alone. Got one with "
            "a call, fields or a name of its own."
        )
    return [*layers[:-1], call(last, function)]


def _next_tokens(
    module: Any,
    x: jax.Array,
    *,
    positions: jax.Array,
    seed: jax.Array,
    request: jax.Array,
    temperature: jax.Array,
    top_k: jax.Array,
    top_p: jax.Array,
) -> jax.Array:
    """The token after the last position of every text; the logits of other positions are not computed."""
    last = positions.argmax(axis=1)  # the first of those that repeat it
    rows = jnp.take_along_axis(x, last[:, None, None], axis=1)
    return sample(
        module(rows)[:, 0],
        positions.max(axis=1),
        seed=seed,
        request=request,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
    )
