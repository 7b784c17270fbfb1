"""Examines a user's layers without allocating anything: their leaves, and what each call takes."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from meshpipe.layers.constructors import check_arrays, constructor_of, module_of
from meshpipe.layers.fields import (
    LayerCall,
    Names,
    call_of,
    check_exists,
    fields_of,
    is_given_rngs,
    optional_fields,
    output_names,
    parameters_of,
)
from meshpipe.layers.layer import Layer, LayerLike, Origin, leaves_of, stream_of_call, value_of
from meshpipe.layers.modes import mode_keywords, pinned
from meshpipe.layers.paths import check_distinct, join
from meshpipe.layers.shared import Groups, Variables, shared_groups, variables_of
from meshpipe.layers.sown import without_values
from meshpipe.loss_term import LossTerm
from meshpipe.phases import each


def abstract_layers(layers: Sequence[LayerLike], batch_fields: Iterable[str] | None) -> tuple[Layer, ...]:
    """Every layer with its shapes, without allocating anything. With None for `batch_fields`, what its call takes is
    left open, and it cannot be called.

    Raises `ValueError` when a layer is neither a module, nor a constructor of one, nor a function of the activation, or
    its call needs something that is neither a batch field nor an output with a name. Errors of constructors get a note
    that says which it is.
    """
    fields = None if batch_fields is None else tuple(batch_fields)
    names = output_names(layers, fields or ())
    made: dict[int, tuple[Layer, nnx.Module]] = {}
    """By constructor. Each is called once, however often it is in the list: it makes the same each time, unless it uses
    variables that existed before."""
    result: list[Layer] = []
    variables: list[Variables] = []
    for index, entry in enumerate(each("Examining", "layer", layers)):
        path, given = f"layers/{index}", entry.layer if isinstance(entry, LayerCall) else entry
        if id(given) in made:
            first, module = made[id(given)]
            layer = _at(path, first)
        else:
            layer, module = _abstract(path, given)
            held = variables_of(path, module)
            variables.append({p: v for p, v in held.items() if not isinstance(v.get_value(), jax.core.Tracer)})
            if not variables[-1]:
                made[id(given)] = layer, module
        known = None if fields is None else _names_at(index, fields, names, result)
        result.append(_called(layer, module, entry if isinstance(entry, LayerCall) else LayerCall(entry), known))
    groups = {leaf: group for group in shared_groups(variables) for leaf in group}
    return tuple(
        replace(layer, shared={p: groups[p] for p in (*layer.params, *layer.state) if p in groups}) if groups else layer
        for layer in result
    )


def _names_at(index: int, fields: Sequence[str], names: Mapping[str, int], before: Sequence[Layer]) -> Names:
    """What the layer at an index may ask for; `names` has those of all outputs."""
    outputs = {name: f"{before[i].path} ({before[i].class_name})" for name, i in names.items() if i < index}
    return Names(fields, outputs, {name: f"layers/{i}" for name, i in names.items() if i >= index})


def shared_parameters(layers: Sequence[Layer]) -> Groups:
    """The groups of parameters that are one variable; the first path of a group owns it."""
    return tuple(dict.fromkeys(layer.shared[path] for layer in layers for path in layer.params if path in layer.shared))


def _at(path: str, layer: Layer) -> Layer:
    """The same layer at another position."""

    def moved(leaf: str) -> str:
        return path + leaf.removeprefix(layer.path)

    return replace(
        layer,
        path=path,
        params={moved(leaf): shape for leaf, shape in layer.params.items()},
        state={moved(leaf): shape for leaf, shape in layer.state.items()},
        axes={moved(leaf): names for leaf, names in layer.axes.items()},
        streams=tuple(map(moved, layer.streams)),
        pinned=tuple(map(moved, layer.pinned)),
        once=tuple(map(moved, layer.once)),
    )


def _called(layer: Layer, module: nnx.Module, call: LayerCall, names: Names | None) -> Layer:
    """A layer with what its call takes; without `names`, that is left open."""
    called = call_of(module, call.function)
    fields = {} if names is None else fields_of(layer.path, module, called, names, call.fields)
    if names is not None and call.input is not None:
        where = f"{layer.path} ({layer.class_name})"
        check_exists(where, call.input, names, "A layer must read a field of the batch, or a named output.")
    draws = is_given_rngs(called, fields, has_streams=bool(layer.streams))
    return replace(
        layer,
        fields=fields,
        optional=optional_fields(called, fields) if call.fields is None else (),
        modes=mode_keywords(module, [p for p in parameters_of(called) if p.name not in fields]),
        streams=(*layer.streams, stream_of_call(layer.path)) if draws else layer.streams,
        draws=draws,
        function=call.function,
        name=call.name,
        input=call.input,
        sows=call.sows,
    )


def _abstract(path: str, given: Any) -> tuple[Layer, nnx.Module]:
    """A layer whose call is left open, and the traced module."""
    make, ready = constructor_of(path, given)
    built: list[tuple[nnx.Module, nnx.GraphDef]] = []

    def build() -> nnx.State:
        module = module_of(path, given, make)
        graphdef, structure = nnx.split(module, graph=True)
        check_arrays(path, module, structure)
        built.append((module, graphdef))
        return structure

    with nnx.use_eager_sharding(False):
        structure = jax.eval_shape(build)
    ((module, graphdef),) = built
    params, state, axes, streams = _sorted_leaves(path, type(module).__name__, structure)
    abstract = Layer(
        path=path,
        graphdef=graphdef,
        structure=structure,
        params=params,
        state=state,
        axes=axes,
        fields={},
        optional=(),
        modes=(),
        pinned=tuple(f"{join(path, key)}.{name}" for key, name in pinned(module)),
        streams=tuple(streams),
        draws=False,
        once=tuple(join(path, key) for key, _ in run_once_per_step(module)),
        origin=Origin(make, leaves_of(path, nnx.state(ready, graph=True)) if ready is not None else None),
    )
    return abstract, module


def run_once_per_step(module: nnx.Module) -> list[tuple[tuple[Any, ...], Any]]:
    """The parts of a module, with their keys, whose method `after_step` runs once per step."""
    parts = nnx.iter_modules(module, graph=True)
    return [(tuple(key), part) for key, part in parts if callable(getattr(type(part), "after_step", None))]


def _sorted_leaves(
    path: str, class_name: str, structure: nnx.State
) -> tuple[dict[str, Any], dict[str, Any], dict[str, tuple[str | None, ...]], list[str]]:
    """Shapes of the parameters and of the other state, logical axes, and random streams of a module, by leaf path."""
    params: dict[str, Any] = {}
    state: dict[str, Any] = {}
    axes: dict[str, tuple[str | None, ...]] = {}
    streams: list[str] = []
    check_distinct((join(path, key) for key, _ in nnx.to_flat_state(structure)), f"variables of {class_name}")
    for key, variable in nnx.to_flat_state(structure):
        leaf, value = join(path, key), value_of(variable)
        if isinstance(variable, nnx.RngState):
            streams += [leaf] if isinstance(variable, nnx.RngKey) else []
            continue
        if isinstance(variable, LossTerm):
            raise without_values([leaf])
        if not hasattr(value, "shape"):
            raise ValueError(
                f"Every variable of a layer must hold one array. {leaf} ({type(variable).__name__}) holds a "
                f"{type(value).__name__}. Drop what the module has sown: nnx.pop(module, nnx.Intermediate)."
            )
        trainable = isinstance(variable, nnx.Param) and jnp.issubdtype(value.dtype, jnp.inexact)
        (params if trainable else state)[leaf] = jax.ShapeDtypeStruct(value.shape, value.dtype)
        if isinstance(variable, nnx.Variable) and (names := variable.get_metadata().get("out_sharding")):
            axes[leaf] = tuple(names)
    return params, state, axes, streams
