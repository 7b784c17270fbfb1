"""What a stage computes once per step: gathered parameters, and what depends on parameters alone."""

from collections.abc import Sequence

import jax
from jax.extend.core import Jaxpr, JaxprEqn, Var

from meshpipe.stage.jaxpr import hoistable_values, variables


def gather(param: jax.Array, whole: jax.ShapeDtypeStruct) -> jax.Array:
    """The parameter as a step reads it, gathered over the data axis.

    It depends on parameters alone, so it is hoisted and made once per step. Left to itself, XLA's partitioner now and
    then splits activations like the parameters instead, and communicates those in every microbatch.
    """
    return jax.lax.with_sharding_constraint(param, whole.sharding.spec)


def is_gather(equation: JaxprEqn) -> bool:
    """Whether it is what `gather` makes."""
    return equation.primitive.name == "sharding_constraint"


def values_to_prepare(jaxpr: Jaxpr, owned: Sequence[Var]) -> list[Var]:
    """The values of a traced stage that are worth computing once per step from parameters and fixed state, `owned`.

    A checkpoint takes gathered parameters as they are, to cast them again in backward. That reads the casts instead
    (`reuse`), so parameters are not kept gathered beside casts that are all that forward reads.
    """
    gathers = [e for e in jaxpr.eqns if is_gather(e) and not set(owned).isdisjoint(variables(e.invars))]
    return hoistable_values(jaxpr, owned, {v for e in gathers for v in e.outvars})
