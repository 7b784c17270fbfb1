"""Says in a sentence why the best layout of a family lost."""

from meshpipe.advise.estimate import Estimate
from meshpipe.advise.layout import Layout
from meshpipe.advise.search import Family
from meshpipe.report.tables import count_of, format_bytes, format_seconds

MATTERS = 0.01
"""Differences below this share of a step are not worth a word."""


def why_lost(family: Family, winner: Estimate | None, limit: float) -> str:
    """The reason, from what the family's best step spends its time on and the winner's does not.

    Arguments:
        family: A family of layouts.
        winner: The layout that won; None if nothing fits.
        limit: The bytes of a device that a step may need.
    """
    best = family.best
    if best is None or winner is None:
        return _why_none(family, limit)
    if best.layout == winner.layout:
        return "won"
    longer = best.seconds - winner.seconds
    if longer < MATTERS * winner.seconds:
        return f"as fast as the winner, within {MATTERS:.0%}"
    # Compiled programs say how long a step takes; what it is spent on is known of the estimates.
    excess = {name: best.parts.get(name, 0.0) - winner.parts.get(name, 0.0) for name in best.parts}
    reasons = [
        _PHRASES[name](best, winner)
        for name in sorted(excess, key=lambda name: -excess[name])
        if excess[name] > max(MATTERS * winner.seconds, 0.25 * longer)
    ]
    return "; ".join(reasons[:2]) or "a little more of everything"


def _why_none(family: Family, limit: float) -> str:
    if family.least is None:
        return f"impossible: {family.impossible}"
    needed, layout = family.least
    doubled = ", with all parameters and optimizer state on each part of the data axis," if _replicates(layout) else ""
    return f"does not fit: {layout.mesh}{doubled} needs {format_bytes(needed)} of {format_bytes(limit)} at least"


def _replicates(layout: Layout) -> bool:
    return layout.data > 1 and not layout.is_sharded


def _share(estimate: Estimate, name: str) -> str:
    # Where the programs were compiled, the parts are still those of the estimate.
    seconds = estimate.parts[name]
    return f"{format_seconds(seconds)}, {seconds / sum(estimate.parts.values()):.0%} of a step"


def _compute(best: Estimate, winner: Estimate) -> str:
    more = best.parts["compute"] / winner.parts["compute"] - 1
    if best.layout.pipeline > winner.layout.pipeline:
        return f"its slowest rank computes {more:.0%} more: layers do not divide evenly among {best.layout.pipeline}"
    return f"it computes {more:.0%} longer: its smaller products wait for memory"


def _recompute(best: Estimate, winner: Estimate) -> str:
    return f"to fit, it recomputes ({best.layout.remat}): {_share(best, 'recompute')}"


def _tensor(best: Estimate, winner: Estimate) -> str:
    return f"all-reduces of activations over {best.layout.tensor} devices: {_share(best, 'tensor')}"


def _bubble(best: Estimate, winner: Estimate) -> str:
    layout = best.layout
    microbatches = count_of(layout.num_microbatches, "microbatch", "microbatches")
    return f"ranks wait: {_share(best, 'bubble')}, with {microbatches} on {layout.pipeline} ranks"


def _host(best: Estimate, winner: Estimate) -> str:
    return f"the host cannot start so many actions in time: {_share(best, 'host')}"


def _reduce(best: Estimate, winner: Estimate) -> str:
    what = "reduce-scatter" if best.layout.is_sharded else "all-reduce"
    return f"{what} of gradients over {best.layout.data} parts of the data axis: {_share(best, 'reduce')}"


def _gather(best: Estimate, winner: Estimate) -> str:
    return f"all-gather of parameters over {best.layout.data} parts of the data axis: {_share(best, 'gather')}"


def _update(best: Estimate, winner: Estimate) -> str:
    return f"every device updates more parameters: {_share(best, 'update')}"


_PHRASES = {
    "compute": _compute,
    "recompute": _recompute,
    "tensor": _tensor,
    "bubble": _bubble,
    "host": _host,
    "reduce": _reduce,
    "gather": _gather,
    "update": _update,
}
"""How each part of a step is put into words."""
