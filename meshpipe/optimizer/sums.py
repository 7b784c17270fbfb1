"""The names of the sums that stages add up over the microbatches of a step, and the means that are made of them."""

import math
from collections.abc import Iterable, Mapping

from meshpipe.errors import ArgumentError

LOSS, WEIGHT = "loss", "weight"
"""The sum of the losses, and how many there are."""

_TERM, _METRIC, _SOWN = "terms/", "metrics/", "sown/"
_WEIGHTS = {_METRIC: "weights/", _SOWN: "examples/"}


def term_sums(terms: Mapping[str, object]) -> dict[str, object]:
    """Terms that layers add to the loss, by names that no other sum has."""
    return {_TERM + name: value for name, value in terms.items()}


def metric_sums(metrics: Mapping[str, tuple[object, object]], *, sown: bool = False) -> dict[str, object]:
    """Sums and weights of metrics, or of scalars that layers sow for them, by names that no other sum has."""
    kind = _SOWN if sown else _METRIC
    return {
        name: value
        for metric, pair in metrics.items()
        for name, value in zip((kind + metric, _WEIGHTS[kind] + metric), pair, strict=True)
    }


def is_term(name: str) -> bool:
    return name.startswith(_TERM)


def further_sums(names: Iterable[str]) -> tuple[str, ...]:
    """Those of the names that are neither the loss nor its weight: terms first, each once."""
    return tuple(sorted({*names} - {LOSS, WEIGHT}, key=lambda name: (not is_term(name), name)))


def weight_of(name: str) -> str | None:
    """The name of the sum that a sum is divided by for its mean; None for a weight, of which there is none."""
    for kind, weight in _WEIGHTS.items():
        if name.startswith(kind):
            return weight + name.removeprefix(kind)
    return WEIGHT if name == LOSS or is_term(name) else None


def name_of_mean(name: str) -> str:
    """The name under which the mean of a sum is reported."""
    kind = next((kind for kind in (_TERM, _METRIC, _SOWN) if name.startswith(kind)), "")
    return name.removeprefix(kind)


def check_names(names: Iterable[str]) -> None:
    """Raises `ArgumentError` when two means of the sums of a model would be reported under one name."""
    kinds = {_TERM: "a term of the loss", _METRIC: "a metric", _SOWN: "an nnx.Intermediate"}
    found: dict[str, str] = {}
    for name in dict.fromkeys(names):
        reported = name_of_mean(name)
        if weight_of(name) is None or found.setdefault(reported, name) == name:
            continue
        both = " and ".join(kinds[other.removesuffix(reported)] for other in (found[reported], name))
        raise ArgumentError(
            f"Terms of the loss, metrics and what layers sow for them need names of their own. Got {reported!r} as "
            f"{both}. Rename one."
        )


def means(sums: Mapping[str, float]) -> dict[str, float]:
    """The means of the loss, of terms and of metrics, in the order of their sums; NaN where the weight is 0."""
    pairs = {name_of_mean(name): (total, sums[weight]) for name, total in sums.items() if (weight := weight_of(name))}
    return {name: total / weight if weight else math.nan for name, (total, weight) in pairs.items()}
