"""What a stage computes once per step: gathered parameters, and what depends on parameters alone."""

from collections.abc import Sequence

import jax
from jax.extend.core import Jaxpr, JaxprEqn, Var

from meshpipe.stage.jaxpr import LAYOUT_PRIMITIVES, hoistable_values, variables


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
    (`reuse`), so parameters are not kept gathered beside casts that are all that forward reads. Where forward reads
    them in another way, backward may need them, and would gather them in every microbatch.
    """
    gathers = [e for e in jaxpr.eqns if is_gather(e) and not set(owned).isdisjoint(variables(e.invars))]
    gathered = {v for e in gathers for v in e.outvars}
    casts = set(hoistable_values(jaxpr, owned, gathered)) if gathered else set()
    needed = set(variables(jaxpr.outvars)) - gathered
    for equation in reversed(jaxpr.eqns):
        name = equation.primitive.name
        is_cast = name == "convert_element_type" and casts.issuperset(equation.outvars)
        if not is_cast and not (name in LAYOUT_PRIMITIVES and needed.isdisjoint(equation.outvars)):
            needed.update(variables(equation.invars))
    return hoistable_values(jaxpr, owned, gathered - needed)
