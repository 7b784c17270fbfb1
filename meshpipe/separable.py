"""Whether an Optax transformation can update every stage by itself, and which stages it updates in the same way."""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax
from jax.extend.core import ClosedJaxpr, jaxprs_in_params

from meshpipe.pipeline.jaxpr import MissingInputError, extract, inline

Shapes = Mapping[str, jax.ShapeDtypeStruct]


def kinds_of_updates(transformation: optax.GradientTransformation, stages: Sequence[Shapes]) -> list[Hashable]:
    """For each stage, something that is equal for those whose states start and change in the same way but for names;
    None where that cannot be told.

    Masks and labels may look at names, so this is found in the traced programs of the whole model. Raises `ValueError`
    when a stage's update would need another stage's gradients, which a stage does not have, or random numbers.
    """
    if len(stages) < 2:
        return [None] * len(stages)
    params = {path: jax.ShapeDtypeStruct(s.shape, s.dtype) for stage in stages for path, s in stage.items()}
    start, state = jax.make_jaxpr(transformation.init, return_shape=True)(params)
    update, shapes = jax.make_jaxpr(transformation.update, return_shape=True)(params, state, params)
    _check_separable(update, shapes, stages, params, state)
    kinds: list[Hashable] = []
    parts = [(inline(start), (params,), state), (inline(update), (params, state, params), shapes)]
    for stage in stages:
        place = {path: number for number, path in enumerate(stage)}
        try:
            kinds.append(tuple(_part_of_stage(*part, place) for part in parts))
        except MissingInputError:
            # One operation works on leaves of several stages (a `cond`), though it does not mix them.
            kinds.append(None)
    return kinds


def _part_of_stage(closed: ClosedJaxpr, inputs: Any, outputs: Any, place: Mapping[str, int]) -> Hashable:
    """The part of a traced program that a stage's leaves go through, with places instead of names."""

    def chosen(tree: Any, variables: Sequence[Any]) -> list[tuple[str, Any]]:
        """Leaves of the stage, and those that belong to no parameter, in an order that names do not change."""
        found = []
        for (path, _), variable in zip(jax.tree_util.tree_flatten_with_path(tree)[0], variables, strict=True):
            names = [
                str(key) if getattr(key, "key", None) not in all_names else f"[{place.get(key.key)}]" for key in path
            ]
            if "[None]" not in names:
                found.append(("".join(names), variable))
        return sorted(found, key=lambda pair: pair[0])

    all_names = _names(inputs)
    given, wanted = chosen(inputs, closed.jaxpr.invars), chosen(outputs, closed.jaxpr.outvars)
    part = extract(closed, [v for _, v in given], [v for _, v in wanted])
    constants = tuple((str(np.asarray(c).dtype), np.shape(c), np.asarray(c).tobytes()) for c in part.consts)
    return str(part.jaxpr), constants, tuple(name for name, _ in given), tuple(name for name, _ in wanted)


def _names(inputs: Any) -> frozenset[str]:
    """The paths of all parameters, which are the keys of the first argument."""
    return frozenset(inputs[0])


def _check_separable(update: ClosedJaxpr, shapes: Any, stages: Sequence[Shapes], params: Shapes, state: Any) -> None:
    stage_of = {path: index for index, stage in enumerate(stages) for path in stage}
    if _draws_random_numbers(update.jaxpr):
        raise ValueError(
            "An optimizer must not draw random numbers when there are several stages: its draws would depend on how "
            "the layers are cut. Got a transformation that does, such as optax.add_noise. Leave it out."
        )
    paths = [path for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]]
    sources = [frozenset((stage_of[path[0].key],)) for path in paths]
    reached = _dependencies(update.jaxpr, [*sources, *([frozenset()] * len(jax.tree.leaves(state))), *sources])
    for (path, _), found in zip(jax.tree_util.tree_flatten_with_path(shapes)[0], reached, strict=True):
        if len(found) > 1:
            raise ValueError(
                "An optimizer must update each parameter from its own gradient, since no stage sees another's. Got a "
                f"transformation in which {path[-1].key} depends on stages "
                f"{', '.join(map(str, sorted(found)))}. For clipping by the global norm leave "
                "optax.clip_by_global_norm out and pass clip_norm=..., which counts every stage."
            )


def _dependencies(jaxpr: Any, inputs: Sequence[frozenset[int]]) -> list[frozenset[int]]:
    """For each output of a traced program, the union of the sources of the inputs that it depends on."""
    known = dict(zip(jaxpr.invars, inputs, strict=True))
    nothing: frozenset[int] = frozenset()

    def of(atom: Any) -> frozenset[int]:
        return nothing if hasattr(atom, "val") else known.get(atom, nothing)

    for equation in jaxpr.eqns:
        operands = [of(atom) for atom in equation.invars]
        name, params = equation.primitive.name, equation.params
        if name in ("jit", "pjit", "closed_call"):
            results = _dependencies(params["jaxpr"].jaxpr, operands)
        elif name == "cond":
            branches = [_dependencies(branch.jaxpr, operands[1:]) for branch in params["branches"]]
            results = [operands[0].union(*outs) for outs in zip(*branches, strict=True)]
        else:
            results = [nothing.union(*operands)] * len(equation.outvars)
        known.update(zip(equation.outvars, results, strict=True))
    return [of(atom) for atom in jaxpr.outvars]


def _draws_random_numbers(jaxpr: Any) -> bool:
    names = ("random_", "threefry", "rng_")
    return any(
        equation.primitive.name.startswith(names) or any(map(_draws_random_numbers, jaxprs_in_params(equation.params)))
        for equation in jaxpr.eqns
    )
