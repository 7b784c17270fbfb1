"""How programs are written for a platform.

The alternatives compute the same values; each choice is the one that XLA runs fastest there. docs/performance.md has
the measurements.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from jax.extend.core import ClosedJaxpr
from jax.sharding import Mesh

from meshpipe.mesh import on_cpu
from meshpipe.stage.products import KEEP_BARRIERS, multiply_in_rows
from meshpipe.stage.residuals import ARITHMETIC_PRIMITIVES, ELEMENTWISE_PRIMITIVES


@dataclass(frozen=True, kw_only=True)
class Target:
    """How programs are written and compiled for one kind of device."""

    name: str
    fuses_last_stage: bool
    """Whether forward and backward of the last stage are one program where backward directly follows forward."""
    repeatable: frozenset[str]
    """The primitives of forward whose results backward may recompute instead of reading them."""
    rebuilds_apart: bool
    """Whether barriers stop XLA from fusing what backward recomputes with the rest of backward."""
    rewrite_products: Callable[[ClosedJaxpr], ClosedJaxpr] | None
    """Rewrites the matrix products of a traced backward for the backend; None leaves them as they are."""
    backward_options: Mapping[str, Any]
    """Compiler options for backward programs."""
    initialise_options: Mapping[str, Any]
    """Compiler options for the programs that draw the initial parameters."""

    @classmethod
    def of(cls, mesh: Mesh) -> "Target":
        """The target for the devices of a mesh."""
        return CPU if on_cpu(mesh) else ACCELERATOR


CPU = Target(
    name="cpu",
    # Two programs are up to 1.8 times faster than one: XLA's CPU backend makes every memory-bound loop of the joint
    # program slower. Barriers between the halves do not help.
    fuses_last_stage=False,
    # Recomputing quotients, exponentials or tanh makes programs up to 30 % slower.
    repeatable=ARITHMETIC_PRIMITIVES,
    # The CPU backend takes longer for both parts when it merges them into one loop.
    rebuilds_apart=True,
    rewrite_products=multiply_in_rows,
    backward_options=KEEP_BARRIERS,
    # Programs that draw random numbers take seconds to optimise and run once. The level does not change their values.
    initialise_options={"xla_backend_optimization_level": 1},
)

ACCELERATOR = Target(
    name="accelerator",
    # On a GPU, two programs take 1.1 times as long as one.
    fuses_last_stage=True,
    # To read a value from memory takes longer than to compute it by elementwise operations.
    repeatable=ELEMENTWISE_PRIMITIVES,
    rebuilds_apart=False,
    rewrite_products=None,
    backward_options={},
    initialise_options={},
)
