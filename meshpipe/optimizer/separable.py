"""Finds whether an Optax transformation can update each stage separately, and which stages it updates alike."""

import re
from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import jax
import numpy as np
import optax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, jaxprs_in_params

from meshpipe.compiler.digest import digest, digest_of_text
from meshpipe.errors import advise
from meshpipe.optimizer.parameters import ShapesByPath
from meshpipe.processes.agreement import HASH
from meshpipe.stage.jaxpr import MissingInputError, extract, inline, variables

_Source = TypeVar("_Source", bound=Hashable)
_NUMBER = re.compile(r"(?<![\w.])(-?\d+\.\d*(?:e[+-]?\d+)?)(?=:f)")
"""A constant in a printed program."""


def kinds_and_frozen(
    transformation: optax.GradientTransformation, stages: Sequence[ShapesByPath]
) -> tuple[list[Hashable], frozenset[str]]:
    """What `kinds_of_updates` returns, and the paths of parameters whose gradient reaches no update, now or later, as
    those that `optax.set_to_zero` gets.
    """
    start, opt_state, update, shapes = _trace(transformation, stages)
    return _kinds(start, opt_state, update, shapes, stages), _frozen(update, opt_state, stages)


def kinds_of_updates(transformation: optax.GradientTransformation, stages: Sequence[ShapesByPath]) -> list[Hashable]:
    """For each stage, a key that is equal for stages whose states start and change alike, apart from the names of
    leaves.

    None for a stage of which that cannot be told. Masks and labels may depend on names, so the traced programs of the
    whole model are compared. Raises `ValueError` when the update of a stage needs random numbers, or the gradients of
    another stage, which are on other devices.
    """
    return _kinds(*_trace(transformation, stages), stages)


def _trace(
    transformation: optax.GradientTransformation, stages: Sequence[ShapesByPath]
) -> tuple[ClosedJaxpr, Any, ClosedJaxpr, Any]:
    """Optax on the whole model: its start, the state's shapes, its update, and what that returns."""
    params = _shapes(stages)
    with start_of_optimizer(params):
        start, opt_state = jax.make_jaxpr(transformation.init, return_shape=True)(params)
    with call_of_optimizer():
        update, shapes = jax.make_jaxpr(transformation.update, return_shape=True)(params, opt_state, params)
    return start, opt_state, update, shapes


def _shapes(stages: Sequence[ShapesByPath]) -> dict[str, jax.ShapeDtypeStruct]:
    return {path: jax.ShapeDtypeStruct(s.shape, s.dtype) for stage in stages for path, s in stage.items()}


def _frozen(update: ClosedJaxpr, opt_state: Any, stages: Sequence[ShapesByPath]) -> frozenset[str]:
    paths = sorted(_shapes(stages))  # the order of a dict's leaves
    own: list[frozenset[str]] = [frozenset((path,)) for path in paths]
    kept: list[frozenset[str]] = [frozenset()] * len(jax.tree.leaves(opt_state))
    while True:
        reached = _dependencies(update.jaxpr, [*own, *kept, *([frozenset()] * len(paths))])
        updates, after = reached[: len(paths)], reached[len(paths) :]
        more = [before | now for before, now in zip(kept, after, strict=True)]
        if more == kept:
            return frozenset(paths).difference(*updates)
        kept = more


def _kinds(
    start: ClosedJaxpr, opt_state: Any, update: ClosedJaxpr, shapes: Any, stages: Sequence[ShapesByPath]
) -> list[Hashable]:
    if len(stages) < 2:
        return [None] * len(stages)
    params = _shapes(stages)
    _check_separable(update, shapes, stages, params, opt_state)
    places = [{path: number for number, path in enumerate(stage)} for stage in stages]
    starts = _parts_of_stages(inline(start), (params,), opt_state, places)
    updates = _parts_of_stages(inline(update), (params, opt_state, params), shapes, places)
    return [None if None in parts else parts for parts in zip(starts, updates, strict=True)]


def describe_updates(
    transformation: optax.GradientTransformation, stages: Sequence[ShapesByPath], kinds: Sequence[Hashable]
) -> dict[str, str]:
    """The traced update of all stages as a hash, and the constants in it, such as the learning rate.

    `kinds` are those of `kinds_of_updates`.
    """
    text = repr(kinds)
    if None in kinds:
        params = {path: jax.ShapeDtypeStruct(s.shape, s.dtype) for stage in stages for path, s in stage.items()}
        start, opt_state = jax.make_jaxpr(transformation.init, return_shape=True)(params)
        update = jax.make_jaxpr(transformation.update)(params, opt_state, params)
        text = f"{start} {update} {digest([*start.consts, *update.consts])}"
    numbers = {float(number) for number in _NUMBER.findall(text)}
    return {
        "update of the optimizer": HASH + digest_of_text(text),
        "numbers in it": " ".join(f"{number:.6g}" for number in sorted(numbers)),
    }


@contextmanager
def start_of_optimizer(params: ShapesByPath) -> Iterator[None]:
    """Raises `ValueError` when the transformation cannot make its state from these parameters."""
    try:
        yield
    except Exception as error:
        raise ValueError(
            "An optimizer sees the parameters of one stage at a time, a dict by leaf path. "
            f"Got a transformation that cannot start from {', '.join(params) or 'a stage without parameters'}. Write "
            "masks and labels as functions of the parameters, e.g. mask=lambda params: jax.tree.map(...). Optax says: "
            f"{error}"
        ) from error


@contextmanager
def call_of_optimizer() -> Iterator[None]:
    """Raises `ValueError` when the transformation needs arguments that it does not get; its other errors get a note."""
    try:
        yield
    except Exception as error:
        if isinstance(error, TypeError) and (more := re.search(r"missing \d+ required .*argument.?: (.*)", str(error))):
            raise ValueError(
                "An optimizer gets gradients, its state and the parameters. Got a transformation that needs more: "
                f"its update also asks for {more[1]}. Choose one that does not."
            ) from error
        advise(error, "This comes from the optimizer's update, called with gradients, its state and the parameters.")
        raise


def _parts_of_stages(
    closed: ClosedJaxpr, inputs: Any, outputs: Any, places: Sequence[Mapping[str, int]]
) -> list[Hashable]:
    """For each stage, the part of a traced program that its leaves go through, with places instead of names.

    None where one operation works on leaves of several stages (a `cond`), though it does not mix them.
    """
    given = _leaves_of_stages(inputs, closed.jaxpr.invars, places)
    wanted = _leaves_of_stages(outputs, closed.jaxpr.outvars, places)
    equations = _equations_of_stages(closed.jaxpr, [[v for _, v in leaves] for leaves in wanted])
    parts: list[Hashable] = []
    for there, asked, own in zip(given, wanted, equations, strict=True):
        program = ClosedJaxpr(closed.jaxpr.replace(eqns=own), closed.consts)
        try:
            part = extract(program, [v for _, v in there], [v for _, v in asked])
        except MissingInputError:
            parts.append(None)
            continue
        constants = tuple((str(np.asarray(c).dtype), np.shape(c), np.asarray(c).tobytes()) for c in part.consts)
        parts.append((str(part.jaxpr), constants, tuple(name for name, _ in there), tuple(name for name, _ in asked)))
    return parts


def _leaves_of_stages(
    tree: Any, atoms: Sequence[Any], places: Sequence[Mapping[str, int]]
) -> list[list[tuple[str, Any]]]:
    """For each stage its leaves, and those that belong to no parameter, in an order that names do not change."""
    stage_of = {path: stage for stage, place in enumerate(places) for path in place}
    found: list[list[tuple[str, Any]]] = [[] for _ in places]
    for (path, _), variable in zip(jax.tree_util.tree_flatten_with_path(tree)[0], atoms, strict=True):
        named = [(key, getattr(key, "key", None)) for key in path]
        owners = {stage_of[name] for _, name in named if name in stage_of}
        for stage in range(len(places)) if not owners else owners if len(owners) == 1 else ():
            names = [f"[{places[stage][name]}]" if name in stage_of else str(key) for key, name in named]
            found[stage].append(("".join(names), variable))
    return [sorted(leaves, key=lambda pair: pair[0]) for leaves in found]


def _equations_of_stages(jaxpr: Jaxpr, wanted: Sequence[Sequence[Any]]) -> list[list[JaxprEqn]]:
    """For each stage the equations that its outputs need, of all stages in one pass."""
    needing: dict[Any, int] = defaultdict(int)
    """The stages that need a value, as the bits of a number."""
    for stage, outputs in enumerate(wanted):
        for variable in variables(outputs):
            needing[variable] |= 1 << stage
    equations: list[list[JaxprEqn]] = [[] for _ in wanted]
    for equation in reversed(jaxpr.eqns):
        stages = 0
        for variable in equation.outvars:
            stages |= needing.get(variable, 0)
        for variable in variables(equation.invars) if stages else ():
            needing[variable] |= stages
        for stage in range(stages.bit_length()):
            if stages >> stage & 1:
                equations[stage].append(equation)
    return [own[::-1] for own in equations]


def _check_separable(
    update: ClosedJaxpr, shapes: Any, stages: Sequence[ShapesByPath], params: ShapesByPath, opt_state: Any
) -> None:
    stage_of = {path: index for index, stage in enumerate(stages) for path in stage}
    if _draws_random_numbers(update.jaxpr):
        raise ValueError(
            "An optimizer must not draw random numbers when there are several stages: its draws would depend on how "
            "the layers are cut. Got a transformation that does, such as optax.add_noise. Leave it out."
        )
    paths = [path for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]]
    sources = [frozenset((stage_of[path[0].key],)) for path in paths]
    reached = _dependencies(update.jaxpr, [*sources, *([frozenset()] * len(jax.tree.leaves(opt_state))), *sources])
    for (path, _), found in zip(jax.tree_util.tree_flatten_with_path(shapes)[0], reached, strict=True):
        if len(found) > 1:
            raise ValueError(
                "An optimizer must update each parameter from its own gradient, since no stage sees another's. Got a "
                f"transformation in which {jax.tree_util.keystr(path)} depends on stages "
                f"{', '.join(map(str, sorted(found)))}. For clipping by the global norm leave "
                "optax.clip_by_global_norm out and pass clip_norm=..., which counts every stage."
            )


def _dependencies(jaxpr: Any, inputs: Sequence[frozenset[_Source]]) -> list[frozenset[_Source]]:
    """For each output of a traced program, the union of the sources of the inputs that it depends on."""
    known = dict(zip(jaxpr.invars, inputs, strict=True))
    nothing: frozenset[_Source] = frozenset()

    def of(atom: Any) -> frozenset[_Source]:
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
