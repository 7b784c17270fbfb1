"""Flax's linear modules with an adapter of low rank beside their kernel (LoRA, arXiv 2106.09685, section 4.1).

The leaves of the module keep their paths; those of the adapter are `lora/lora_a` and `lora/lora_b`, as in
`nnx.LoRALinear`, which has no scale and is for one kind of module.
"""

import string
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from meshpipe.layers.embed import Embed, look_up

ADAPTER = "lora"
"""The attribute of a module that holds its adapter."""


class Adapter(nnx.Module):
    """The two factors of a change of low rank of a kernel."""

    def __init__(
        self, lora_a: nnx.LoRAParam, lora_b: nnx.LoRAParam, *, scale: float, dropout: float, rngs: nnx.Rngs | None
    ) -> None:
        self.lora_a = lora_a
        """`[shared..., inputs..., rank]`, of the dims of the kernel."""
        self.lora_b = lora_b
        """`[shared..., rank, outputs...]`; zero at the beginning, so that an adapted model begins as its base."""
        self.scale = scale
        self.dropout = nnx.Dropout(dropout, rngs=rngs) if dropout else None

    def factors(self, dtype: Any) -> tuple[jax.Array, jax.Array]:
        return self.lora_a[...].astype(dtype), self.lora_b[...].astype(dtype)

    def dropped(self, x: Any) -> Any:
        return x if self.dropout is None else self.dropout(x)


class Dims(NamedTuple):
    """What the dims of a kernel are to the product that it is in."""

    shared: tuple[int, ...]
    """Those that the input and the output have as well; each of their indices has a product of its own."""
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


class LoRALinear(nnx.Linear):
    """An `nnx.Linear` with an adapter."""

    lora: Adapter

    def __call__(self, inputs: Any, out_sharding: Any = None) -> jax.Array:
        y = super().__call__(inputs, out_sharding=out_sharding)
        dtype = self.dtype or jnp.result_type(inputs, self.kernel[...])
        a, b = self.lora.factors(dtype)
        hidden = jnp.matmul(self.lora.dropped(inputs.astype(dtype)), a, precision=self.precision) * self.lora.scale
        return y + jnp.matmul(hidden, b, precision=self.precision).astype(y.dtype)


class LoRALinearGeneral(nnx.LinearGeneral):
    """An `nnx.LinearGeneral` with an adapter."""

    lora: Adapter

    def __call__(self, inputs: Any, out_sharding: Any = None) -> jax.Array:
        y = super().__call__(inputs, out_sharding=out_sharding)
        dtype = self.dtype or jnp.result_type(inputs, self.kernel[...])
        a, b = self.lora.factors(dtype)
        axes = tuple(axis % inputs.ndim for axis in self.axis)
        batch = tuple(axis % inputs.ndim for axis in self.batch_axis)
        of_a = tuple(range(len(batch), len(batch) + len(axes)))
        every = tuple(range(len(batch)))
        x = self.lora.dropped(inputs.astype(dtype))
        hidden = jax.lax.dot_general(x, a, ((axes, of_a), (batch, every)), precision=self.precision) * self.lora.scale
        last = ((hidden.ndim - 1,), (len(batch),))
        return y + jax.lax.dot_general(hidden, b, (last, (every, every)), precision=self.precision).astype(y.dtype)


class LoRAEinsum(nnx.Einsum):
    """An `nnx.Einsum` with an adapter."""

    lora: Adapter

    def __call__(self, inputs: Any, einsum_str: str | None = None, out_sharding: Any = None) -> jax.Array:
        y = super().__call__(inputs, einsum_str, out_sharding=out_sharding)
        dtype = self.dtype or jnp.result_type(inputs, self.kernel[...])
        a, b = self.lora.factors(dtype)
        to_rank, from_rank = einsum_of_factors(self.einsum_str)
        x = self.lora.dropped(inputs.astype(dtype))
        hidden = jnp.einsum(to_rank, x, a, precision=self.precision) * self.lora.scale
        return y + jnp.einsum(from_rank, hidden, b, precision=self.precision).astype(y.dtype)


class LoRAEmbed(nnx.Embed):
    """An `nnx.Embed` with an adapter, of the table that is looked up in and, used backwards, multiplied by."""

    lora: Adapter

    def __call__(self, inputs: Any, out_sharding: Any = None) -> jax.Array:
        y = super().__call__(inputs, out_sharding=out_sharding)
        a, b = self.lora.factors(self.dtype)
        if len(a) == 1:
            rows = jnp.broadcast_to(a, (*inputs.shape, a.shape[-1]))
        else:
            rows = look_up(self.lora.lora_a[...], inputs, self.dtype)
        return y + ((self.lora.dropped(rows) * self.lora.scale) @ b).astype(y.dtype)

    def attend(self, query: Any, out_sharding: Any = None) -> jax.Array:
        y = super().attend(query, out_sharding=out_sharding)
        dtype = self.dtype or jnp.result_type(query, self.embedding[...])
        a, b = self.lora.factors(dtype)
        hidden = (self.lora.dropped(query.astype(dtype)) @ b.T) * self.lora.scale
        return y + (hidden @ a.T).astype(y.dtype)


class LoRAFloat32Embed(LoRAEmbed, Embed):
    """The same of an `Embed` whose gradient is summed in float32."""


KINDS: dict[type[nnx.Module], type[nnx.Module]] = {
    nnx.Linear: LoRALinear,
    nnx.LinearGeneral: LoRALinearGeneral,
    nnx.Einsum: LoRAEinsum,
    Embed: LoRAFloat32Embed,  # before the class that it is derived from
    nnx.Embed: LoRAEmbed,
}
"""By module of Flax, or one of ours in its place, the same with an adapter."""
_METHODS = ("__call__", "attend")
"""What an adapted module computes anew; a module with one of its own cannot be adapted."""


def kind_for(module: Any) -> type[nnx.Module] | None:
    """The module of Flax that this one is, if an adapter fits it."""
    for kind in KINDS:
        if isinstance(module, kind) and not is_adapted(module):
            own = (getattr(type(module), name, None) is not getattr(kind, name, None) for name in _METHODS)
            return None if any(own) else kind
    return None


def is_adapted(module: Any) -> bool:
    return isinstance(module, (*KINDS.values(), nnx.LoRALinear))


def kernel_of(module: Any) -> nnx.Param[Any]:
    return module.embedding if isinstance(module, nnx.Embed) else module.kernel


def dims_of(module: Any) -> Dims:
    """Raises `ValueError` for an einsum that multiplies by something else than the kernel, such as a sum over it."""
    if isinstance(module, nnx.LinearGeneral):
        shared, inputs = len(module.batch_axis), len(module.in_features)
        ndim = shared + inputs + len(module.out_features)
        return Dims(tuple(range(shared)), tuple(range(shared, shared + inputs)), tuple(range(shared + inputs, ndim)))
    if not isinstance(module, nnx.Einsum):
        return Dims((), (0,), (1,))
    left, kernel, out = _terms(module.einsum_str)
    if "." in kernel or not set(kernel) <= set(left) | set(out) or len(set(kernel)) < len(kernel):
        raise ValueError(
            f"every dim of its kernel must be one of the input or the output, and it is {left},{kernel}->{out}"
        )
    shared_dims = tuple(i for i, name in enumerate(kernel) if name in left and name in out)
    inputs_dims = tuple(i for i, name in enumerate(kernel) if name in left and name not in out)
    return Dims(shared_dims, inputs_dims, tuple(i for i, name in enumerate(kernel) if name not in left))


def einsum_of_factors(einsum: str) -> tuple[str, str]:
    """The two einsums that take an input to the rank and from there to the output."""
    left, kernel, out = _terms(einsum)
    rank = next(name for name in string.ascii_letters if name not in left + kernel + out)
    shared = "".join(name for name in kernel if name in left and name in out)
    inputs = "".join(name for name in kernel if name in left and name not in out)
    outputs = "".join(name for name in kernel if name not in left)
    kept = "".join(name for name in left if name in out or name == ".") + rank
    return f"{left},{shared}{inputs}{rank}->{kept}", f"{kept},{shared}{rank}{outputs}->{out}"


def _terms(einsum: str) -> tuple[str, str, str]:
    terms, _, out = einsum.replace(" ", "").partition("->")
    left, _, kernel = terms.partition(",")
    return left, kernel, out


def graft(module: Any, adapter: Adapter) -> None:
    """Gives a module an adapter, in place: what holds the module then holds an adapted one."""
    kind: Any = type(module)
    _turn_into(module, _adapted_class(kind))
    module.lora = adapter


def cut_off(module: Any) -> None:
    """Takes the adapter away from a module, in place."""
    del module.lora
    adapted = {*_MADE, *KINDS.values(), nnx.LoRALinear}
    _turn_into(module, next(kind for kind in type(module).__mro__ if kind not in adapted))


@cache
def _adapted_class(kind: type[nnx.Module]) -> type[nnx.Module]:
    """The class with an adapter of a class of Flax, or of one that is derived from it."""
    if kind in KINDS:
        return KINDS[kind]
    base = next(base for base in KINDS if issubclass(kind, base))
    made = type(f"LoRA{kind.__name__}", (KINDS[base], kind), {"__module__": kind.__module__})
    _MADE.add(made)
    return made


_MADE: set[type] = set()
"""Classes that `_adapted_class` has made."""


def _turn_into(module: Any, kind: type[nnx.Module]) -> None:
    object.__setattr__(module, "__class__", kind)


def delta(module: Any) -> jax.Array:
    """What the adapter adds to the kernel, in float32 or the wider dtype of the factors."""
    adapter, dims = module.lora, dims_of(module)
    dtype = jnp.result_type(adapter.lora_a[...], jnp.float32)
    a, b = (factor[...].astype(dtype) for factor in (adapter.lora_a, adapter.lora_b))
    names = "abcdefghijklmnopqrstuvw"[: kernel_of(module)[...].ndim]

    def of(which: Sequence[int]) -> str:
        return "".join(names[i] for i in which)

    shared, inputs, outputs = map(of, dims)
    product = jnp.einsum(f"{shared}{inputs}z,{shared}z{outputs}->{names}", a, b, precision=jax.lax.Precision.HIGHEST)
    return product * getattr(adapter, "scale", 1.0)  # nnx.LoRA has none
