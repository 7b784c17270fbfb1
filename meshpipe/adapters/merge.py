"""Adds adapters to the kernels that they are of, so that the base alone computes what the adapted model does."""

from collections.abc import Sequence
from typing import Any

from flax import nnx

from meshpipe.adapters.adapted import cut_off, delta, is_adapted, kernel_of
from meshpipe.errors import ArgumentError, kind_of
from meshpipe.layers.fields import LayerCall


def merge_lora(modules: Sequence[Any], /) -> list[Any]:
    """Modules without adapters, whose kernels have `A @ B * scale` of `meshpipe.lora`, or `A @ B` of `nnx.LoRALinear`,
    added.

    The sum is made in float32 and rounded once to the dtype of the kernel, so outputs equal those of the adapted
    modules to the rounding of that dtype: keep a base in bfloat16 unmerged if its adapters are small beside that. The
    modules that are given stay as they are; the new ones share the variables that did not change. Entries that are no
    modules are returned as they are.

    Raises `ValueError` when modules that hold one kernel have different adapters, and for a class that is derived from
    `nnx.LoRALinear`, which may compute something else.
    """
    if isinstance(modules, str) or not isinstance(modules, Sequence | nnx.List):
        raise ArgumentError(f"`modules` must be a list of modules. Got {kind_of(modules)}. Pass [module].")
    entries: list[Any] = [entry.layer if isinstance(entry, LayerCall) else entry for entry in modules]
    copies = nnx.clone(nnx.List([e for e in entries if isinstance(e, nnx.Module)]), variables=False, graph=True)
    _merge(copies)
    new = iter(copies)
    return [next(new) if isinstance(entry, nnx.Module) else entry for entry in entries]


def _merge(modules: nnx.List[Any]) -> None:
    """In place, but for kernels, of which new variables are made."""
    adapters: dict[int, tuple[int, float] | None] = {}
    """By kernel, the factor and the scale of its adapter; None where it has none."""
    kernels: dict[int, Any] = {}
    found = [(path, part) for path, part in nnx.iter_modules(modules, graph=True) if _has_kernel(part)]
    for path, part in found:
        if isinstance(part, nnx.LoRALinear) and type(part) is not nnx.LoRALinear:
            raise ArgumentError(
                "An adapter can be merged if it is of meshpipe.lora, or of nnx.LoRALinear itself. "
                f"Got {'/'.join(map(str, path))}, {kind_of(part)}, which is derived from it. Keep it unmerged."
            )
        kernel, adapter = kernel_of(part), getattr(part, "lora", None) if is_adapted(part) else None
        own = None if adapter is None else (id(adapter.lora_a), getattr(adapter, "scale", 1.0))
        if adapters.setdefault(id(kernel), own) != own:
            raise ArgumentError(
                "Modules that hold one kernel must have one adapter, to be merged into it. "
                f"{'/'.join(map(str, path))} has another than one that it shares its kernel with. "
                "Give both an adapter, or keep them unmerged."
            )
        if adapter is not None and id(kernel) not in kernels:
            value = kernel[...]
            kernels[id(kernel)] = kernel.replace((value + delta(part)).astype(value.dtype))
    for _, part in found:
        new = kernels.get(id(kernel_of(part)))
        if new is not None:
            setattr(part, "embedding" if isinstance(part, nnx.Embed) else "kernel", new)
        if is_adapted(part):
            cut_off(part)


def _has_kernel(part: Any) -> bool:
    return isinstance(part, nnx.Linear | nnx.LinearGeneral | nnx.Einsum | nnx.Embed)
