"""The names of the sums that stages add up over the microbatches of a step, and the means that are made of them."""

import math
from collections.abc import Iterable, Mapping

LOSS, WEIGHT = "loss", "weight"
"""The sum of the losses, and how many there are."""

_TERM, _METRIC, _WEIGHT = "terms/", "metrics/", "weights/"


def term_sums(terms: Mapping[str, object]) -> dict[str, object]:
    """Terms that layers add to the loss, by names that no other sum has."""
    return {_TERM + name: value for name, value in terms.items()}


def metric_sums(metrics: Mapping[str, tuple[object, object]]) -> dict[str, object]:
    """Sums and weights of metrics, by names that no other sum has."""
    return {
        name: value
        for metric, pair in metrics.items()
        for name, value in zip((_METRIC + metric, _WEIGHT + metric), pair, strict=True)
    }


def is_term(name: str) -> bool:
    return name.startswith(_TERM)


def further_sums(names: Iterable[str]) -> tuple[str, ...]:
    """Those of the names that are neither the loss nor its weight: terms first, each once."""
    return tuple(sorted({*names} - {LOSS, WEIGHT}, key=lambda name: (not is_term(name), name)))


def weight_of(name: str) -> str | None:
    """The name of the sum that a sum is divided by for its mean; None for a weight, of which there is none."""
    if name.startswith(_METRIC):
        return _WEIGHT + name.removeprefix(_METRIC)
    return WEIGHT if name == LOSS or is_term(name) else None


def name_of_mean(name: str) -> str:
    """The name under which the mean of a sum is reported."""
    return name.removeprefix(_TERM).removeprefix(_METRIC)


def means(sums: Mapping[str, float]) -> dict[str, float]:
    """The means of the loss, of terms and of metrics, in the order of their sums; NaN where the weight is 0."""
    pairs = {name_of_mean(name): (total, sums[weight]) for name, total in sums.items() if (weight := weight_of(name))}
    return {name: total / weight if weight else math.nan for name, (total, weight) in pairs.items()}
