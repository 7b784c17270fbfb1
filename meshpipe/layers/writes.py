"""Checks what a call changed in its module: state is kept, and any other change is an error, so none is lost
silently.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from types import FunctionType
from typing import Any

import jax
from flax import nnx

from meshpipe.compiler.fingerprint import fingerprint
from meshpipe.layers.modes import ATTRIBUTES
from meshpipe.layers.paths import join
from meshpipe.layers.sown import is_sown
from meshpipe.stage.passthrough import forwarded

_PLAIN = (int, float, bool, str, type(None), FunctionType)
"""The types of most attributes; they hold nothing that could change."""


_NONE = object()
"""Stands for an attribute that is not there."""


class WriteError(ValueError):
    """A call changed something that it must not change; the message names it."""


def attributes_of(path: str, module: nnx.Module) -> dict[str, Any]:
    """What a module and its parts hold beside variables, as it was: later changes inside lists and dicts show."""
    found = {}
    for where, node in _parts(path, module, set()):
        for name, value in vars(node).items():
            if name not in ATTRIBUTES and not name.startswith("_pytree__") and _is_static(value):
                found[f"{where}.{name}"] = value if type(value) in _PLAIN else fingerprint(value)
    return found


def _parts(path: str, value: Any, seen: set[int]) -> Iterator[tuple[str, nnx.Pytree]]:
    """A module and the modules in it, each once; quicker than `nnx.iter_graph`, which looks at every attribute."""
    if type(value) in _PLAIN or id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, nnx.Pytree):
        yield path, value
        children: Iterable[tuple[Any, Any]] = vars(value).items()
    elif isinstance(value, Mapping):
        children = value.items()
    elif isinstance(value, list | tuple):
        children = enumerate(value)
    else:
        return
    for key, child in children:
        yield from _parts(join(path, (key,)), child, seen)


def check_attributes(kind: str, before: Mapping[str, Any], after: Mapping[str, Any], method: str = "__call__") -> None:
    """Raises `WriteError` when a call assigned an attribute or changed one in place."""
    changed = [name for name in {**before, **after} if not _same(before.get(name, _NONE), after.get(name, _NONE))]
    if changed:
        raise WriteError(
            f"A layer's {method} is traced once and then runs compiled, so it cannot keep Python values. "
            f"{kind} changed {_some(changed)}. Keep a number that changes in an nnx.Variable made by the constructor, "
            "and other values in local names."
        )


def check_variables(
    kind: str, before: Mapping[str, Any], random: Collection[str], after: Mapping[str, Any], method: str = "__call__"
) -> None:
    """Raises `WriteError` when a call made variables other than those that are collected (`sown.py`), dropped some, or
    gave one another shape or dtype. `random` has the paths of random streams, which are not among those before.
    """
    made = [path for path in after if path not in before and path not in random]
    if method != "__call__" and (sown := [path for path in made if is_sown(after[path])]):
        raise WriteError(
            f"Values must be sown in __call__, for the loss and the metrics of the batch. {kind} sows {_some(sown)} in "
            f"{method}, which nothing would read. Sow them in __call__, or keep them in an nnx.Variable."
        )
    if made := [path for path in made if not is_sown(after[path])]:
        types = ", ".join(sorted({type(after[path]).__name__ for path in made}))
        raise WriteError(
            f"Every variable of a layer must be made by its constructor. {kind} made {_some(made)} ({types}) in "
            f"{method}, which nothing would read. Make it in the constructor, or keep the value in a local name. "
            "To sow a term of the loss, use the type meshpipe.LossTerm, and for a value of the metrics "
            "nnx.Intermediate."
        )
    if dropped := [path for path in before if path not in after]:
        raise WriteError(
            f"A layer's variables must stay where they are. {kind} dropped {_some(dropped)} in {method}. "
            "Set its value in place: variable[...] = value."
        )
    for path, value in before.items():
        new = _value(after[path])
        if getattr(new, "shape", None) != value.shape or new.dtype != value.dtype:
            found = f"{new.dtype}{list(new.shape)}" if hasattr(new, "shape") else type(new).__name__
            raise WriteError(
                f"A variable must keep its shape and dtype. {kind} made {path} {found} in {method}; it was "
                f"{value.dtype}{list(value.shape)}. Cast what is written to it."
            )


def written(
    before: Mapping[str, Any], after: Mapping[str, Any], retrace: Callable[[list[Any], Sequence[str]], list[Any]]
) -> list[str]:
    """Which variables a call wrote to.

    Transformations such as `nnx.jit` hand every variable back as a new value, whether it was written to or not; then
    the call is traced once more, by `retrace(values before, their paths)`, to see what becomes of each.
    """
    replaced = [path for path, value in before.items() if _value(after[path]) is not value]
    if not replaced:
        return []
    traced = jax.make_jaxpr(lambda values: retrace(values, replaced))([before[path] for path in replaced])
    return [path for i, (path, source) in enumerate(zip(replaced, forwarded(traced.jaxpr), strict=True)) if source != i]


def check_written(
    kind: str, paths: Sequence[str], shared: Mapping[str, Sequence[str]], method: str = "__call__"
) -> None:
    """Raises `WriteError` for writes to parameters, and to state that several layers share."""
    for path in paths:
        if path in shared:
            others = ", ".join(other for other in shared[path] if other != path)
            raise WriteError(
                f"State that a call writes to must belong to one layer. {kind} writes to {path}, the same variable as "
                f"{others}; the layers may lie on different devices. Give each layer its own (nnx.clone, or a "
                "constructor in the list), or do not write to it: for a norm, use_running_average=True."
            )
    if paths and method != "__call__":
        raise WriteError(
            f"Parameters are changed by the optimizer alone. {kind} writes to {_some(paths)} in {method}. Keep what it "
            "updates in an nnx.Variable of another type than nnx.Param."
        )
    if paths:
        raise WriteError(
            f"Parameters are changed by the optimizer alone. {kind} writes to {_some(paths)} in {method}, as "
            "nnx.WeightNorm and nnx.SpectralNorm do; what that trains depends on the number of microbatches. Compute "
            "the value in a local name and use that (jnp.dot(x, kernel / norm)), or keep it in an nnx.Variable of "
            "another type than nnx.Param, which calls may change."
        )


def _is_static(value: Any) -> bool:
    if type(value) in _PLAIN:
        return True
    parts = jax.tree.leaves(value, is_leaf=lambda part: isinstance(part, nnx.Pytree | nnx.Variable))
    return not any(isinstance(part, nnx.Pytree | nnx.Variable | jax.Array) for part in parts)


def _same(a: Any, b: Any) -> bool:
    return a is b or (type(a) is type(b) and bool(a == b))


def _value(variable: Any) -> Any:
    return variable.get_value() if isinstance(variable, nnx.Variable) else variable


def _some(paths: Sequence[str], longest: int = 3) -> str:
    return ", ".join(paths[:longest]) + (f" and {len(paths) - longest} more" if len(paths) > longest else "")
