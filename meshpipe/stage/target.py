"""What XLA does best on the devices of a mesh: the one place where platforms differ.

Every choice here is between programs that compute the same. The numbers behind them are in docs/performance.md.
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
    """Whether forward and backward of the last stage are one program where one follows the other at once."""
    repeatable: frozenset[str]
    """Primitives of forward that backward may compute again rather than read."""
    rebuilds_apart: bool
    """Whether what backward computes again is kept from being merged with the rest of it."""
    rewrite_products: Callable[[ClosedJaxpr], ClosedJaxpr] | None
    """Writes the matrix products of a traced backward as the backend multiplies them fastest; None leaves them."""
    backward_options: Mapping[str, Any]
    """Compiler options for backwards."""
    initialise_options: Mapping[str, Any]
    """Compiler options for the programs that draw the initial parameters, which run once."""

    @classmethod
    def of(cls, mesh: Mesh) -> "Target":
        return CPU if on_cpu(mesh) else ACCELERATOR


CPU = Target(
    name="cpu",
    # Two programs are up to 1.8 times faster than one.
    fuses_last_stage=False,
    # To compute quotients or tanh again makes the programs of XLA's CPU backend up to 30 % slower.
    repeatable=ARITHMETIC_PRIMITIVES,
    rebuilds_apart=True,
    rewrite_products=multiply_in_rows,
    backward_options=KEEP_BARRIERS,
    # Random numbers take seconds to optimise; their values are the same.
    initialise_options={"xla_backend_optimization_level": 1},
)

ACCELERATOR = Target(
    name="accelerator",
    fuses_last_stage=True,
    # An accelerator takes longer to read a value than to compute it by operations on single elements.
    repeatable=ELEMENTWISE_PRIMITIVES,
    rebuilds_apart=False,
    rewrite_products=None,
    backward_options={},
    initialise_options={},
)
