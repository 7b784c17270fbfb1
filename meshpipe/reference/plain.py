"""Training on one device, without stages, schedules or microbatch programs: what the pipeline must equal."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.extend.core import Var

Leaves = dict[str, jax.Array]
"""Arrays by name. A leaf has the name that it has in the layers, e.g. `layers/3/kernel`."""
Batch = Mapping[str, Any]
Loss = Callable[..., tuple[Any, Any]]
"""Output, microbatch and, by keyword, named outputs -> sum of losses, weight."""


class LossInputs(NamedTuple):
    """What a model puts out for its loss."""

    output: Any
    named: Mapping[str, Any]
    """Further outputs by keyword of the loss."""
    terms: Mapping[str, Any]
    """What the model adds to the loss, by name: sums over the microbatch."""


@runtime_checkable
class PlainModel(Protocol):
    """A model as a pure function, which owns no values."""

    names: Mapping[str, str]
    """For every leaf path of the layers, the name of the leaf here; several paths of one parameter share a name."""
    trained: frozenset[str]
    """The names of the parameters, which have gradients."""
    kept: Leaves
    """The values of leaves that no layer has."""
    splits: bool
    """Whether its results depend on the microbatch: it draws random numbers, has state or sows values that are read."""
    initial: Leaves
    """The values that it starts from, as far as it knows them by itself."""

    def run(self, params: Leaves, state: Leaves, batch: Batch, draws: Any) -> tuple[LossInputs, Leaves]:
        """The outputs, and the leaves that forward may have written, as they are afterwards."""
        ...

    def after_step(self, params: Leaves, state: Leaves) -> Leaves:
        """The state that the model updates once per step, from the new parameters and the state after forward."""
        ...

    def describe(self) -> str: ...


@dataclass(frozen=True)
class Values:
    """All that an update starts from."""

    params: Leaves
    state: Leaves
    opt_state: Any


class Updated(NamedTuple):
    """What an update leaves."""

    params: Leaves
    opt_state: Any
    once: Leaves
    """The state that the model updates once per step."""


@dataclass(frozen=True)
class Gradients:
    """What one batch yields before the optimizer."""

    loss: float
    norm: float
    """Of the gradient before clipping, without that of parameters that the optimizer never moves."""
    gradients: dict[str, np.ndarray]
    """Of the mean loss, after clipping."""
    written: Leaves
    """The leaves that forward wrote, as they are after the last microbatch."""
    terms: Mapping[str, float]
    """What the model adds to the loss, by name, as means like the loss."""
    counts: bool
    """False where the weight of the whole batch is 0: there is no mean to follow, and the update is to be left out."""


class PlainTraining:
    """A model, a loss and an optimizer on one device: `jax.value_and_grad` of the batch's mean loss, then Optax.

    It keeps nothing between updates: each is computed from the values that it is given. The batch is taken whole,
    unless the model draws random numbers, has state, adds terms to the loss or sows values that are read: those depend
    on the microbatch by definition, so the same microbatches are run one after the other and their sums added up
    before the one division.
    """

    def __init__(
        self,
        model: PlainModel,
        loss: Loss,
        optimizer: optax.GradientTransformation,
        *,
        seed: int,
        num_microbatches: int,
        clip_norm: float | None,
    ):
        self._model, self._loss, self._optimizer, self._clip_norm = model, loss, optimizer, clip_norm
        self.device = jax.devices()[0]
        self._seed = jax.random.key_data(jax.random.key(seed))
        self._frozen_names: set[str] | None = None
        self._num_microbatches = num_microbatches
        self._split: int | None = None
        """How many microbatches a batch is run in; None before the first."""

    def gradients(self, values: Values, batch: Batch, step: int) -> Gradients:
        """The loss and its gradients for a batch; `step` counts from 0."""
        microbatches = self._microbatches(values, batch)
        params, state = values.params, values.state
        written: Leaves = {}
        sums: list[tuple[float, float]] = []
        terms: list[Mapping[str, float]] = []
        gradients = None
        for index, microbatch in enumerate(microbatches):
            draws = jax.device_put((self._seed, np.uint32(step), np.uint32(index)), self.device)
            found, gradient = self._sum_and_gradient(params, state, microbatch, draws)
            _, (total, weight, of_model, after) = found
            sums.append((float(total), float(weight)))
            terms.append({name: float(term) for name, term in of_model.items()})
            gradients = gradient if gradients is None else jax.tree.map(jnp.add, gradients, gradient)
            written |= after
            params = {name: after.get(name, leaf) for name, leaf in params.items()}
            state = {name: after.get(name, leaf) for name, leaf in state.items()}
        total, weight = np.sum(np.asarray(sums, np.float64), axis=0)
        mean = {name: np.asarray(wide(g) / float(weight or 1)) for name, g in (gradients or {}).items()}
        frozen = self._frozen(values, mean)
        counted = [g for name, g in mean.items() if name not in frozen]
        norm = float(np.sqrt(sum(np.sum(np.square(np.abs(g), dtype=np.float64)) for g in counted)))
        if self._clip_norm is not None and norm > self._clip_norm:
            mean = {name: np.asarray(g * float(self._clip_norm / norm)) for name, g in mean.items()}
        if not weight:
            return Gradients(0.0, 0.0, mean, written, dict.fromkeys(terms[0], 0.0), counts=False)
        means = {name: sum(found[name] for found in terms) / float(weight) for name in terms[0]}
        return Gradients(float(total / weight), norm, mean, written, means, counts=True)

    def _microbatches(self, values: Values, batch: Batch) -> list[Any]:
        """The batch, whole or split, on the device."""
        if self._split is None:
            draws = self._seed, np.uint32(0), np.uint32(0)
            made = jax.eval_shape(self._model.run, values.params, values.state, dict(batch), draws)[0]
            self._split = self._num_microbatches if self._model.splits or made.terms else 1
        rows = {name: np.split(np.asarray(value), self._split) for name, value in batch.items()}
        return jax.device_put([{n: v[m] for n, v in rows.items()} for m in range(self._split)], self.device)

    def update(self, values: Values, gradients: Mapping[str, Any]) -> Updated:
        """What follows from those gradients; `values` has the state as forward left it."""
        params = {name: values.params[name] for name in gradients}
        moved = jax.device_put({name: np.asarray(g) for name, g in gradients.items()}, self.device)
        new, opt_state = self._update(params, values.opt_state, moved)
        params = {**values.params, **new}
        return Updated(params, opt_state, self._after_step(params, values.state))

    def _frozen(self, values: Values, gradients: Mapping[str, Any]) -> set[str]:
        """The parameters whose gradients the optimizer ignores for good, which do not count in the norm."""
        if self._frozen_names is None:
            # The optimizer knows no parameter that only the uncut model has.
            params = {name: values.params[name] for name in gradients if name not in self._model.kept}
            update = jax.make_jaxpr(self._optimizer.update)(params, values.opt_state, params).jaxpr
            names, kept = sorted(params), len(jax.tree.leaves(values.opt_state))
            wanted = [True] * len(names) + [False] * kept
            while True:
                used = _used(update, wanted)
                more = [True] * len(names) + used[len(names) : len(names) + kept]
                if more == wanted:
                    break
                wanted = more
            self._frozen_names = {name for name, is_used in zip(names, used, strict=False) if not is_used}
        return self._frozen_names

    @cached_property
    def _sum_and_gradient(self) -> Any:
        def total(params: Leaves, state: Leaves, batch: Batch, draws: Any) -> Any:
            output, written = self._model.run(params, state, batch, draws)
            loss, weight = self._loss(output.output, batch, **output.named)
            scalar = jnp.result_type(float)  # of 64 bits where JAX has them
            loss, weight = jnp.asarray(loss, scalar), jnp.asarray(weight, scalar)
            objective = loss + sum(output.terms.values(), jnp.zeros((), scalar))
            return objective, (loss, weight, output.terms, written)

        return jax.jit(jax.value_and_grad(total, has_aux=True))

    @cached_property
    def _after_step(self) -> Any:
        return jax.jit(self._model.after_step)

    @cached_property
    def _update(self) -> Any:
        def update(params: Leaves, opt_state: Any, gradients: Leaves) -> tuple[Leaves, Any]:
            like = {name: gradients[name].astype(leaf.dtype) for name, leaf in params.items()}
            updates, opt_state = self._optimizer.update(like, opt_state, params)
            return optax.apply_updates(params, updates), opt_state

        return jax.jit(update)


def _used(jaxpr: Any, wanted: Sequence[bool]) -> list[bool]:
    """Which inputs of a traced function the wanted outputs need."""
    needed = {v for v, is_wanted in zip(jaxpr.outvars, wanted, strict=True) if is_wanted and isinstance(v, Var)}
    for equation in reversed(jaxpr.eqns):
        outputs = [v in needed for v in equation.outvars]
        if not any(outputs):
            continue
        used = [True] * len(equation.invars)
        if equation.primitive.name in ("jit", "pjit"):
            used = _used(equation.params["jaxpr"].jaxpr, outputs)
        elif equation.primitive.name == "cond":
            branches = [_used(branch.jaxpr, outputs) for branch in equation.params["branches"]]
            used = [True, *map(any, zip(*branches, strict=True))]
        needed.update(v for v, is_used in zip(equation.invars, used, strict=True) if is_used and isinstance(v, Var))
    return [v in needed for v in jaxpr.invars]


def wide(leaf: Any) -> np.ndarray:
    """An array on the host with at least the precision of float32; complex numbers stay complex."""
    array = np.asarray(leaf)
    return array.astype(jnp.promote_types(array.dtype, jnp.float32))
