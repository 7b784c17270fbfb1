"""A model before it was cut into layers."""

from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

import jax
from flax import nnx


@dataclass(frozen=True)
class Reference:
    """The uncut model that layers were cut from, for `meshpipe.verify` to train by plain JAX and Optax.

    It is run in the mode in which it is given; neither `train()` nor `eval()` is called on it.
    """

    model: nnx.Module | Callable[[nnx.Rngs], nnx.Module]
    """The model, or a constructor that takes an `nnx.Rngs`. It is trained from the layers' values; where layers are
    submodules of it, its own initial values are compared with theirs. It stays as it is."""
    _: KW_ONLY
    call: Callable[[Any, Mapping[str, jax.Array]], Any] | None = None
    """`call(model, microbatch)` returns what the loss takes: the output, or, where the loss reads named outputs, the
    pair `(output, {"memory": ...})` with each of them. None calls the model with the input field alone."""
    paths: Mapping[str, str] = field(default_factory=dict)
    """Where in the model the leaves of layers are, by leading path: `{"layers/0": "embed", "layers/3/norm": "norm"}`.

    The longest path counts. Not needed for layers that are submodules of the model, nor where shapes and the ends of
    paths tell.
    """
    adapter_scale: float | None = None
    """What the product of the two factors of each adapter of the layers is multiplied with before it is added to the
    kernel: `alpha / rank` of `meshpipe.lora`. The model itself has no adapters. None where the layers have none. Where
    a kernel has dims that are neither inputs nor outputs, the layers themselves are compared with instead."""
