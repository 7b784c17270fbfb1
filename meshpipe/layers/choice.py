"""The plan of a model and its cut into stages."""

from dataclasses import dataclass

from meshpipe.plan.layer_costs import ModelCosts
from meshpipe.plan.plan import Plan


@dataclass(frozen=True)
class Choice:
    """A plan and a cut that were chosen for a model, where its config names a way to choose."""

    plan: Plan
    cuts: tuple[range, ...]
    """The layers of every stage."""
    costs: ModelCosts | None
    """What the layers were found to cost; None where nothing was measured or given."""
