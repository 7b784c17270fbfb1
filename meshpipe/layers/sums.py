"""The names of the sums that stages add up over the microbatches of a step, and the means that are made of them."""

import math
from collections.abc import Mapping

LOSS, WEIGHT = "loss", "weight"
"""The sum of the losses, and how many there are."""

_METRIC, _WEIGHT = "metrics/", "weights/"


def metric_sums(metrics: Mapping[str, tuple[object, object]]) -> dict[str, object]:
    """Sums and weights of metrics, by names that no other sum has."""
    return {
        name: value
        for metric, pair in metrics.items()
        for name, value in zip((_METRIC + metric, _WEIGHT + metric), pair, strict=True)
    }


def means(sums: Mapping[str, float]) -> dict[str, float]:
    """The means of the loss and of the metrics, in the order of their sums; NaN where the weight is 0."""
    pairs = {LOSS: (sums[LOSS], sums[WEIGHT])} | {
        name.removeprefix(_METRIC): (total, sums[_WEIGHT + name.removeprefix(_METRIC)])
        for name, total in sums.items()
        if name.startswith(_METRIC)
    }
    return {name: total / weight if weight else math.nan for name, (total, weight) in pairs.items()}
