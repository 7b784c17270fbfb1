"""What layers sow in their calls: terms of the loss, and values for the metrics."""

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from meshpipe.errors import ArgumentError, kind_of
from meshpipe.layers.reserved_names import RESERVED
from meshpipe.loss_term import LossTerm
from meshpipe.optimizer.sums import LOSS, WEIGHT, is_term, metric_sums, term_sums
from meshpipe.sharding import scalar_dtype


class Sown(NamedTuple):
    """What the call of a layer sowed, by name."""

    terms: dict[str, jax.Array]
    """Terms of the loss: sums over the microbatch."""
    metrics: dict[str, tuple[jax.Array, int]]
    """Scalars that were sown as `nnx.Intermediate`: their sum, and how many there were."""
    values: dict[str, tuple[Any, ...]]
    """All that was sown as `nnx.Intermediate`, in the order of the calls."""
    not_scalar: frozenset[str]
    """The names of those that are no scalars alone."""


def is_sown(variable: Any) -> bool:
    """Whether a variable that a call made is one of those that are collected."""
    return isinstance(variable, LossTerm | nnx.Intermediate)


def collect(layer: str, made: Mapping[str, nnx.Variable[Any]]) -> Sown:
    """Sorts what a call sowed, by leaf path. Raises `ArgumentError` for names and values that cannot be.

    `layer` names the layer in errors.
    """
    terms: dict[str, jax.Array] = {}
    metrics: dict[str, tuple[jax.Array, int]] = {}
    values: dict[str, tuple[Any, ...]] = {}
    not_scalar: set[str] = set()
    for path, variable in made.items():
        name, value = path.rpartition("/")[2], variable.get_value()
        parts = jax.tree.leaves(value)
        if isinstance(variable, LossTerm):
            check_name(name, layer)
            _check_real(name, layer, parts)
            total = sum((jnp.asarray(part, scalar_dtype()).sum() for part in parts), jnp.zeros((), scalar_dtype()))
            terms[name] = terms[name] + total if name in terms else total
            continue
        if isinstance(variable, nnx.Perturbation):
            continue  # zeros, that the call adds to a value
        values[name] = (*values.get(name, ()), *(value if isinstance(value, tuple) else (value,)))
        if parts and all(_is_number(part) for part in parts):
            check_name(name, layer)
            scalars = [jnp.asarray(part, scalar_dtype()) for part in parts]
            before, count = metrics.get(name, (jnp.zeros((), scalar_dtype()), 0))
            metrics[name] = jax.lax.stop_gradient(sum(scalars, before)), count + len(scalars)
        else:
            not_scalar.add(name)
    if both := sorted(terms.keys() & values.keys()):
        raise ArgumentError(
            "What is sown under one name must be either a term of the loss or an nnx.Intermediate. "
            f"{layer} sows {both[0]!r} as both. Rename one."
        )
    return Sown(terms, metrics, values, frozenset(not_scalar))


def read_by_name(sown: Sown, names: Iterable[str], layer: str) -> dict[str, Any]:
    """What was sown under these names, for others to read: a value that was sown once, or a tuple of all.

    Raises `ArgumentError` for a name under which the call sowed nothing. `layer` names the layer in errors.
    """
    found = {}
    for name in names:
        if name not in sown.values:
            way_out = "A term is a part of the loss already." if name in sown.terms else "Correct the name."
            known = ", ".join(sown.values) or "nothing"
            raise ArgumentError(
                f"sows must name what the call sows as nnx.Intermediate. {layer} sows {known}, and {name!r} is asked "
                f"for. {way_out}"
            )
        values = sown.values[name]
        found[name] = values[0] if len(values) == 1 else values
    return found


def sums_of_sown(sown: Sown, layer: Any, batch: Mapping[str, Any], unread: set[tuple[str, str]]) -> dict[str, object]:
    """What the call of a layer with a microbatch adds to the sums of its stage.

    The mean of a metric weighs a microbatch by its examples. Names of what nothing reads are added to `unread`.
    """
    read = {name for _, name in layer.sows}
    unread.update((layer.class_name, name) for name in sown.not_scalar - read)
    examples = next(iter(batch.values())).shape[0]
    metrics = {name: (total * examples, jnp.float32(count * examples)) for name, (total, count) in sown.metrics.items()}
    return {**term_sums(sown.terms), **metric_sums(metrics, sown=True)}


def add_sums(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Adds up sums of one name; the loss and its weight stand first."""
    names = [name for name in (LOSS, WEIGHT) if name in first or name in second]
    return {
        name: first[name] + second[name] if name in first and name in second else {**first, **second}[name]
        for name in dict.fromkeys((*names, *first, *second))
    }


def objective_of(sums: Mapping[str, Any]) -> Any:
    """What is differentiated of a stage's sums: the loss and all terms. None where it has neither."""
    parts = [jnp.asarray(value, scalar_dtype()) for name, value in sums.items() if name == LOSS or is_term(name)]
    return sum(parts[1:], start=parts[0]) if parts else None


def check_name(name: str, layer: str) -> None:
    """Raises `ArgumentError` for a name that results of steps and evaluations have."""
    if name in RESERVED:
        raise ArgumentError(
            f"What a layer sows must not have a name that the results of a step have. {layer} sows {name!r}. "
            "Rename it, e.g. balance."
        )


def without_values(paths: Sequence[str]) -> ArgumentError:
    """The error for a module that holds what earlier calls have sown."""
    return ArgumentError(
        f"A module must not hold what earlier calls have sown. Got {', '.join(paths[:3])}. Drop it: "
        "nnx.pop(module, meshpipe.LossTerm)."
    )


@contextmanager
def sowing() -> Iterator[None]:
    """Lets modules sow without `nnx.capture`, which would drop what they sow under other types without a word."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"\s*Using 'Module.(sow|perturb)\(\)' outside", DeprecationWarning)
        yield


def _check_real(name: str, layer: str, parts: Sequence[Any]) -> None:
    wrong = [part for part in parts if not _is_array(part) or jnp.iscomplexobj(part)]
    if wrong or not parts:
        got = kind_of(wrong[0]) if wrong and not _is_array(wrong[0]) else "complex numbers" if wrong else "nothing"
        raise ArgumentError(
            f"A term of the loss must be a real number, or an array of them to be added up. {layer} sows {got} as "
            f"{name!r}."
        )


def _is_number(part: Any) -> bool:
    return _is_array(part) and np.shape(part) == () and not _is_key(part) and not jnp.iscomplexobj(part)


def _is_key(part: Any) -> bool:
    return isinstance(part, jax.Array) and jnp.issubdtype(part.dtype, jax.dtypes.prng_key)


def _is_array(value: Any) -> bool:
    return isinstance(value, jax.Array | np.ndarray | np.generic | int | float | complex)
