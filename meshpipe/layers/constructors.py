"""Turns an entry of the layer list (a module, a constructor or a function) into a constructor of its module."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from meshpipe.errors import advise, kind_of
from meshpipe.layers.paths import join

Make = Callable[[nnx.Rngs], nnx.Module]
_LIBRARIES = ("jax", "jaxlib", "flax", "numpy")
"""Packages whose functions have keywords with meanings of their own, which batch fields of the same name must not
fill."""


def constructor_of(path: str, layer: Any) -> tuple[Make, nnx.Module | None]:
    """The constructor of a layer's module, and the module itself if it is ready-made.

    A function of the activation counts as a module without variables. Raises `ValueError` for anything else.
    """
    if isinstance(layer, nnx.Module):
        return lambda rngs: layer, layer
    _check_kind(path, layer)
    parameters = _parameters(layer)
    if parameters is None:
        return _function(layer)
    named = {p.name for p in parameters}
    required = [p for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    others = [p.name for p in required if p.name != "rngs"]
    if "rngs" not in named and not isinstance(_innermost(layer), type):
        if others and not _is_constructor(layer, required):
            return _function(layer)
    elif others and ("rngs" in named or len(others) > 1):
        name = _name(layer)
        given = ", ".join(f"{other}=..." for other in others)
        raise ValueError(
            f"A layer's constructor may only require nnx.Rngs. {path} ({name}) requires {', '.join(others)}. Write "
            f"functools.partial({name}, {given}), or give the module itself."
        )
    if "rngs" in named or (not others and any(p.kind is p.VAR_KEYWORD for p in parameters)):
        return lambda rngs: layer(rngs=rngs), None
    return (layer if others else lambda rngs: layer()), None


def module_of(path: str, layer: Any, make: Make) -> nnx.Module:
    """The module that a layer's constructor makes.

    Raises `ValueError` when it makes something else. An error of the constructor gets a note.
    """
    try:
        module: Any = make(nnx.Rngs(0))
    except Exception as error:
        name = _name(layer)
        advice = f"This comes from the constructor of {path} ({name})."
        if isinstance(error, jax.errors.JAXTypeError):  # something was to be known that is traced
            advice += (
                " Constructors are traced, so that no process ever holds the whole model: their arrays have shapes "
                f"and no values. Where one needs values, give the module itself, e.g. {name}(rngs=nnx.Rngs(0))."
            )
        advise(error, advice)
        raise
    if not isinstance(module, nnx.Module):
        raise ValueError(
            f"A layer's constructor must return an nnx.Module. That of {path} returned {kind_of(module)}. "
            "For a function of the activation, give the function itself."
        )
    if not callable(module):
        raise ValueError(
            f"A layer must have a __call__ that takes the activation. {path} is {kind_of(module)}, which has none."
        )
    return module


def check_arrays(path: str, module: nnx.Module, structure: nnx.State) -> None:
    """Raises `ValueError` for an array that is no variable.

    Flax 0.12 takes a plain array that is made under a trace for a constant, and the trace ends before it is used.
    """
    keys = [tuple(map(str, key)) for key, _ in nnx.to_flat_state(structure)]
    known = {key[:length] for key in keys for length in range(len(key) + 1)}
    for where, node in nnx.iter_graph(module, graph=True):
        for name, value in vars(node).items() if isinstance(node, nnx.Module) else ():
            attribute = (*map(str, where), name)
            parts = jax.tree.leaves(value, is_leaf=lambda part: isinstance(part, nnx.Pytree | nnx.Variable))
            if attribute not in known and any(isinstance(part, jax.Array) for part in parts):
                raise ValueError(
                    "The arrays of a layer must be variables. "
                    f"{join(path, attribute)} is a plain array; write nnx.Variable(...) around it, or "
                    "nnx.Param(...) if it is trained."
                )


def _check_kind(path: str, layer: Any) -> None:
    if any(base.__module__.startswith("flax.linen") for base in (type(layer).__mro__)):
        raise ValueError(
            f"A layer must be an nnx.Module. {path} is {kind_of(layer)} of flax.linen. Wrap it: "
            "flax.nnx.bridge.ToNNX(module, rngs=rngs).lazy_init(example)."
        )
    if not callable(layer):
        raise ValueError(
            "A layer must be an nnx.Module, a constructor that takes nnx.Rngs, or a function of the activation. "
            f"{path} is {kind_of(layer)}. For a constructor write e.g. "
            "lambda rngs: nnx.Linear(8, 8, rngs=rngs)."
        )


def _innermost(layer: Any) -> Any:
    return _innermost(layer.func) if isinstance(layer, functools.partial) else layer


def _name(layer: Any) -> str:
    function = _innermost(layer)
    return getattr(function, "__name__", type(function).__name__)


def _parameters(layer: Any) -> list[inspect.Parameter] | None:
    """The remaining parameters of a callable; None where they cannot be known.

    Those of a class come from `__init__`, since its metaclass takes anything.
    """
    given = layer if isinstance(layer, functools.partial) else functools.partial(layer)
    function: Any = given.func
    if isinstance(function, type):
        start: Any = function.__init__  # type: ignore[misc]
        if start is object.__init__:
            return []
        given = functools.partial(start, None, *given.args, **given.keywords)
    try:
        return list(inspect.signature(given).parameters.values())
    except (TypeError, ValueError):  # functions of C
        return None


def _is_constructor(layer: Any, required: list[inspect.Parameter]) -> bool:
    """Whether a function of something that is not called `rngs` makes a module of it; where nothing else tells, it is
    called, without allocating anything.
    """
    annotated = "Rngs" in str(required[0].annotation)
    if len(required) > 1 or annotated:
        return annotated
    made: list[Any] = []
    try:
        with nnx.use_eager_sharding(False):
            jax.eval_shape(lambda: made.append(layer(nnx.Rngs(0))))
    except Exception:
        return False
    return isinstance(made[0], nnx.Module)


def _function(function: Any) -> tuple[Make, nnx.Module]:
    """A module without variables, whose call is the function."""

    def call(self: nnx.Module, *arguments: Any, **keywords: Any) -> Any:
        return function(*arguments, **keywords)

    parameters = _parameters(function)
    if parameters is None:
        parameters = [inspect.Parameter("x", inspect.Parameter.POSITIONAL_ONLY)]
    home = getattr(_innermost(function), "__module__", None) or ""
    if home.partition(".")[0] in _LIBRARIES:
        parameters = [p for p in parameters if p.default is p.empty]
    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    call.__signature__ = inspect.Signature([own, *parameters])  # type: ignore[attr-defined]
    call.__module__ = home
    module: nnx.Module = type(_name(function), (nnx.Module,), {"__call__": call, "__module__": home})()
    return lambda rngs: module, module
