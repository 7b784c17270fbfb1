"""Differences between two trainings, each with what is allowed."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from meshpipe.html import html_table
from meshpipe.sharding import widened

SMALL = 1e-2
"""A leaf whose values are all below this share of the largest is judged against that share: its own may be rounding."""
ROUNDINGS = 4
"""So many machine epsilons of a leaf's values may the same update of the same values differ by."""


@dataclass(frozen=True)
class Difference:
    """The largest difference of one quantity between the layout and one device."""

    update: int
    """0 before the first update."""
    quantity: str
    """`loss`, `term NAME` (what layers add to the loss), `gradient norm`, `gradient`, `parameter`, `frozen parameter`,
    `optimizer state`, `state` or `tied parameter` of an update; before the first, `initial parameter`, `initial state`,
    `tied parameter` or `number of leaves`. Scalars of the run that nothing interrupts begin with `uninterrupted`."""
    path: str
    """Leaf path; empty for scalars of the whole model."""
    found: float
    """Largest absolute difference over the leaf's elements."""
    allowed: float

    @property
    def ok(self) -> bool:
        return self.found <= self.allowed  # False for NaN as well

    @property
    def layer(self) -> str:
        """`layers/3`, or the name of the quantity for a scalar."""
        return "/".join(self.path.split("/")[:2]) or self.quantity


@dataclass(frozen=True, repr=False)
class VerifyReport:
    """All differences between a layout and plain training, of every update."""

    differences: tuple[Difference, ...]
    tolerance: float
    """Relative tolerance: the square root of the machine epsilon of the coarsest dtype in the computation."""
    reference: str = "the same layers one after the other"
    """What was trained on one device to compare with."""

    @property
    def ok(self) -> bool:
        return all(d.ok for d in self.differences)

    @property
    def first(self) -> Difference | None:
        """The first that is too large: of the earliest update, in the first layer."""
        bad = [d for d in self.differences if not d.ok]
        return min(bad, key=lambda d: (d.update, not d.path, _layer_number(d))) if bad else None

    def worst_by_layer(self) -> dict[tuple[str, str], Difference]:
        """For each layer and quantity, the difference that comes closest to its tolerance or passes it."""
        worst: dict[tuple[str, str], Difference] = {}
        for d in self.differences:
            key = (d.layer, d.quantity)
            if key not in worst or _ratio(d) > _ratio(worst[key]):
                worst[key] = d
        return worst

    def __repr__(self) -> str:
        if self.first is None:
            return f"VerifyReport(ok: all {len(self.differences)} differences are within their tolerances)"
        bad, first = sum(not d.ok for d in self.differences), self.first
        return (
            f"VerifyReport(failed: {bad} of {len(self.differences)} differences are too large, first {first.quantity} "
            f"{first.path} of update {first.update}: {first.found:.3g}, allowed {first.allowed:.3g})"
        )

    def _repr_html_(self) -> str:
        """A table for notebooks: for each layer and quantity, the difference that comes closest to its tolerance."""
        worst = sorted(self.worst_by_layer().values(), key=lambda d: (d.ok, _layer_number(d), d.quantity))
        columns = ("", "layer", "quantity", "update", "difference", "allowed")
        rows = (
            ("ok" if d.ok else "differs", d.layer, d.quantity, d.update, f"{d.found:.3g}", f"{d.allowed:.3g}")
            for d in worst
        )
        return html_table(repr(self), columns, rows)


class Comparison:
    """Collects differences, each against a tolerance relative to the size of what is compared."""

    def __init__(self, tolerance: float):
        self.tolerance = tolerance
        self.differences: list[Difference] = []

    def scalar(self, update: int, quantity: str, found: float, expected: float) -> None:
        self.differences.append(
            Difference(update, quantity, "", abs(found - expected), self.tolerance * max(abs(expected), self.tolerance))
        )

    def leaves(self, update: int, quantity: str, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
        """Compares every leaf of `expected`; one that was not found counts as 0."""
        largest = max((_largest(leaf) for leaf in expected.values()), default=0.0)
        for path, leaf in expected.items():
            allowed = self.tolerance * max(_largest(leaf), SMALL * largest)
            self._add(update, quantity, path, found.get(path, 0.0), leaf, allowed)

    def changes(
        self,
        update: int,
        quantity: str,
        found: Mapping[str, Any],
        expected: Mapping[str, Any],
        before: Mapping[str, Any],
    ) -> None:
        """Compares what became of every leaf of `before`, and judges it against its change.

        No more is allowed than by `leaves`, nor than the tolerance times the leaf's largest change and some roundings
        of its largest value, so that a lost update is found even if it is small.
        """
        largest = max((_largest(leaf) for leaf in expected.values()), default=0.0)
        for path, leaf in expected.items():
            size, change = _largest(leaf), _largest(_wide(leaf) - _wide(before[path]))
            rounding = ROUNDINGS * _epsilon(before[path]) * max(size, _largest(before[path]))
            allowed = min(self.tolerance * max(size, SMALL * largest), self.tolerance * change + rounding)
            self._add(update, quantity, path, found[path], leaf, allowed)

    def exact(self, update: int, quantity: str, path: str, found: Any, expected: Any) -> None:
        self._add(update, quantity, path, found, expected, 0.0)

    def _add(self, update: int, quantity: str, path: str, found: Any, expected: Any, allowed: float) -> None:
        difference = float(np.max(np.abs(_wide(found) - _wide(expected)), initial=0.0))
        self.differences.append(Difference(update, quantity, path, difference, allowed))


def _largest(leaf: Any) -> float:
    return float(np.max(np.abs(_wide(leaf)), initial=0.0))


def _wide(leaf: Any) -> np.ndarray:
    return widened(np.asarray(leaf))


def _epsilon(leaf: Any) -> float:
    """Of a leaf's dtype; 0 for integers, which have to be equal."""
    dtype = np.asarray(leaf).dtype
    return float(jnp.finfo(dtype).eps) if jnp.issubdtype(dtype, jnp.inexact) else 0.0


def _ratio(difference: Difference) -> float:
    if np.isnan(difference.found):
        return float("inf")
    return difference.found / difference.allowed if difference.allowed else float(difference.found > 0) * float("inf")


def _layer_number(difference: Difference) -> int:
    parts = difference.path.split("/")
    return int(parts[1]) if len(parts) > 1 and parts[1].isdigit() else -1
