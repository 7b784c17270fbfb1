"""`meshpipe.lora`: the layers of a model with adapters of low rank."""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from meshpipe.adapters.adapted import ADAPTER, Adapter, Dims, dims_of, graft, is_adapted, kernel_of
from meshpipe.adapters.config import LoraConfig, as_targets, check_rank, floating_dtype
from meshpipe.adapters.groups import LoraGroup, as_groups
from meshpipe.adapters.targets import Key, Targets
from meshpipe.errors import ArgumentError, check_seed
from meshpipe.layers.arguments import check_layers
from meshpipe.layers.constructors import Make, constructor_of, module_of
from meshpipe.layers.fields import LayerCall
from meshpipe.layers.layer import LayerLike, first_key, path_hash
from meshpipe.layers.paths import join


@dataclass(frozen=True)
class Size:
    """What the adapter of a part of a layer is like."""

    rank: int
    scale: float
    dropout: float
    param_dtype: Any


Parts = tuple[tuple[Key, Size], ...]
"""The parts of a layer that get an adapter."""


@dataclass(frozen=True)
class AdaptedConstructor:
    """Makes the module of a layer, then the adapters of some of its parts."""

    make: Make
    parts: Parts

    def __call__(self, rngs: nnx.Rngs) -> nnx.Module:
        key = rngs.params.key[...]  # before the base draws, and whatever it draws
        module = self.make(rngs)
        adapt(module, self.parts, key, {})
        return module


def lora(
    layers: Sequence[LayerLike],
    /,
    *,
    rank: int,
    alpha: float = 16.0,
    targets: Sequence[str] | None = None,
    dropout: float = 0.0,
    rank_stabilised: bool = False,
    groups: Sequence[LoraGroup | str] = (),
    param_dtype: Any = jnp.float32,
    seed: int = 0,
) -> list[LayerLike]:
    """Layers whose linear parts have adapters of low rank (LoRA, arXiv 2106.09685): `x @ A @ B * alpha / rank` is added
    to what they compute. They begin as the layers that were given, to the bit, since B begins at zero.

    The layers' leaves keep their paths, so that their checkpoints load; those of an adapter are `lora/lora_a` and
    `lora/lora_b` below its module, of the type `nnx.LoRAParam`. The modules that are given stay as they are; the new
    ones hold their variables.

    Arguments:
        layers: As `Trainer` takes them. Constructors become constructors, and draw their own first values as before.
        rank: The rank of the change of each kernel.
        alpha: Scales the change, by `alpha / rank`.
        targets: Patterns, as of `fnmatch`, of paths of modules, each for a whole path (`layers/*/attention/query`) or
            for its end (`query`, `attention/*`). One that begins with `!` leaves out what it matches. By default every
            `nnx.Linear`, `nnx.LinearGeneral` and `nnx.Einsum`; an `nnx.Embed` can be named too, and no other module.
        dropout: The rate at which an adapter's input is dropped in training; for a looked-up embedding, its row of A.
        rank_stabilised: Whether to scale by `alpha / sqrt(rank)` (rsLoRA, arXiv 2312.03732).
        groups: Adapters with a rank or alpha of their own, by the same patterns: `value:rank=16,alpha=8` or a
            `LoraGroup`. The first pattern that matches counts.
        param_dtype: The dtype of the adapters, whatever that of the base; they are computed in the base's.
        seed: What the adapters of ready-made modules draw from; those of constructors draw from the trainer's seed, in
            the same way. A draw depends on seed and path alone.

    Modules that hold one kernel share an adapter. Raises `ValueError` when a pattern matches nothing, or a module that
    no adapter fits; when the rank exceeds the inputs or outputs of a kernel; and when `param_dtype` is no floating
    dtype or `seed` is out of range.
    """
    check_layers(layers)
    check_rank(rank)
    check_seed(seed)
    config = LoraConfig(
        rank=rank,
        alpha=alpha,
        targets=as_targets(targets),
        dropout=dropout,
        rank_stabilised=rank_stabilised,
        groups=as_groups(groups),
    )
    return adapted_layers(layers, config, floating_dtype(param_dtype), seed)


def with_lora(layers: Sequence[LayerLike], config: LoraConfig) -> Sequence[LayerLike]:
    """The layers with the adapters of a config, if it has any."""
    return adapted_layers(layers, config, jnp.float32, 0) if config.rank else layers


def adapted_layers(layers: Sequence[LayerLike], config: LoraConfig, param_dtype: Any, seed: int) -> list[LayerLike]:
    """As `lora`, for checked arguments."""
    chosen = Targets(config)

    def parts(path: str, module: nnx.Module) -> Parts:
        found = chosen.among(path, module)
        return tuple((key, Size(*config.size_of(join(path, key)), config.dropout, param_dtype)) for key in found)

    made: dict[Any, LayerLike] = {}
    """By constructor and parts, so that a constructor that stands in several places still does."""
    entries: list[Any] = [entry.layer if isinstance(entry, LayerCall) else entry for entry in layers]
    ready = iter(nnx.clone(nnx.List([e for e in entries if isinstance(e, nnx.Module)]), variables=False, graph=True))
    shapes: dict[int, nnx.Module] = {}
    parts_of: dict[str, tuple[nnx.Module, Parts]] = {}
    """By path, the ready modules and their parts: all are chosen before any is changed, since layers may share one."""
    result: list[LayerLike] = []
    for index, (entry, given) in enumerate(zip(layers, entries, strict=True)):
        path = f"layers/{index}"
        new: Any = next(ready) if isinstance(given, nnx.Module) else given
        if isinstance(new, nnx.Module):
            parts_of[path] = new, parts(path, new)
        else:
            make, function = constructor_of(path, given)
            if function is None:
                if id(given) not in shapes:
                    shapes[id(given)] = _shapes(path, given, make)
                own = parts(path, shapes[id(given)])
                new = made.setdefault((id(given), own), AdaptedConstructor(make, own)) if own else given
        result.append(replace(entry, layer=new) if isinstance(entry, LayerCall) else new)
    chosen.check()
    shared: dict[int, Adapter] = {}
    for path, (module, found) in parts_of.items():
        adapt(module, found, first_key(jax.random.key(seed), path_hash(path)), shared)
    return result


def adapt(module: nnx.Module, parts: Parts, key: jax.Array, shared: dict[int, Adapter]) -> None:
    """Gives parts of a module adapters, in place. `shared` has those there are, by the kernel that they are of."""
    found: dict[Key, Any] = {tuple(where): part for where, part in nnx.iter_modules(module, graph=True)}
    for where, size in parts:
        part, place = found[where], join("", (*where, ADAPTER))
        kernel = id(kernel_of(part))
        adapter = part.lora if is_adapted(part) else shared.get(kernel)  # where a layer before shares module or kernel
        if adapter is None:
            adapter = _drawn(part, size, jax.random.fold_in(key, zlib.crc32(place.encode())))
        elif (adapter.lora_a.shape[-1], adapter.scale) != (size.rank, size.scale):
            raise ArgumentError(
                "Modules that hold one kernel share an adapter, so `groups` must give them one rank and alpha. Got "
                f"another for {'/'.join(map(str, where))} than for one before it. Name both in one group.",
                "lora",
            )
        shared[kernel] = adapter
        if not is_adapted(part):
            graft(part, adapter)


def _drawn(part: Any, size: Size, key: jax.Array) -> Adapter:
    kernel, dims = kernel_of(part), dims_of(part)
    shape, names = kernel[...].shape, _axes(kernel)

    def of(which: Sequence[int], values: Sequence[Any]) -> tuple[Any, ...]:
        return tuple(values[i] for i in which)

    inputs = (*of(dims.shared, shape), *of(dims.inputs, shape), size.rank)
    outputs = (*of(dims.shared, shape), size.rank, *of(dims.outputs, shape))
    axes_a = (*of(dims.shared, names), *of(dims.inputs, names), None)
    axes_b = (*of(dims.shared, names), None, *of(dims.outputs, names))
    with nnx.use_eager_sharding(False):
        return Adapter(
            nnx.LoRAParam(_first_a(part, dims, inputs, size.param_dtype, key), **_named(axes_a)),
            nnx.LoRAParam(jnp.zeros(outputs, size.param_dtype), **_named(axes_b)),
            scale=size.scale,
            dropout=size.dropout,
            rngs=nnx.Rngs(0) if size.dropout else None,
        )


def _first_a(part: Any, dims: Dims, shape: tuple[int, ...], dtype: Any, key: jax.Array) -> jax.Array:
    """As `nnx.LoRA` draws it, by the number of inputs; a row of a table is looked up, not summed over."""
    if isinstance(part, nnx.Embed):
        return nnx.initializers.normal(1.0)(key, shape, dtype)
    shared = tuple(range(len(dims.shared)))
    inputs = tuple(range(len(dims.shared), len(shape) - 1))
    init = nnx.initializers.he_uniform(in_axis=inputs, batch_axis=shared)
    return init(key, shape, dtype)


def _axes(kernel: nnx.Param[Any]) -> tuple[str | None, ...]:
    names = tuple(kernel.get_metadata().get("out_sharding") or ())
    return (*names, *[None] * (kernel[...].ndim - len(names)))


def _named(axes: tuple[Any, ...]) -> dict[str, Any]:
    return {"out_sharding": axes} if any(axes) else {}


def _shapes(path: str, given: Any, make: Make) -> nnx.Module:
    """The module of a constructor, without values."""
    built: list[nnx.Module] = []
    with nnx.use_eager_sharding(False):
        jax.eval_shape(lambda: built.append(module_of(path, given, make)))
    return built[0]
