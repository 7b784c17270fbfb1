"""The same training on one device, without stages, schedules or microbatch programs: what the pipeline must equal."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from meshpipe.layers.layer import Layer, Leaves, Randomness, path_hash
from meshpipe.layers.stage_function import Loss
from meshpipe.sharding import scalar_dtype, widened

Batch = Mapping[str, Any]


class PlainTrainer:
    """Layers, loss and optimizer on one device: `jax.value_and_grad` of the whole batch's mean loss, then Optax.

    The batch is taken whole, unless the layers draw random numbers or change state: those depend on the microbatch by
    definition, so the same microbatches are run one after the other and their sums added up before the one division.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        loss: Loss,
        optimizer: optax.GradientTransformation,
        *,
        input: str,
        seed: int,
        num_microbatches: int,
        clip_norm: float | None,
        tied: Sequence[Sequence[str]],
    ):
        self._layers, self._loss, self._input, self._clip_norm = layers, loss, input, clip_norm
        self._optimizer = optimizer
        self._owner = {path: group[0] for group in tied for path in group[1:]}
        self._device = jax.devices()[0]
        self._seed = jax.random.key_data(jax.random.key(seed))
        self._split = num_microbatches if any(layer.has_randomness or layer.state for layer in layers) else 1
        with jax.default_device(self._device):
            made = [self._initialise(layer, jax.random.key(seed)) for layer in layers]
            self.params = {k: v for params, _ in made for k, v in params.items() if k not in self._owner}
            self.state = {k: v for _, state in made for k, v in state.items()}
            self.opt_state = optimizer.init(self.params)
        self.step_number = 0

    def step(self, batch: Batch) -> tuple[float, float, dict[str, np.ndarray]]:
        """One update; returns the loss, the gradient norm before clipping, and the gradients that made the update."""
        rows = {name: np.split(np.asarray(value), self._split) for name, value in batch.items()}
        microbatches = jax.device_put([{n: v[m] for n, v in rows.items()} for m in range(self._split)], self._device)
        before, sums, gradients = self.state, [], None
        for index, microbatch in enumerate(microbatches):
            draws = jax.device_put((self._seed, np.uint32(self.step_number), np.uint32(index)), self._device)
            (total, (weight, self.state)), gradient = self._sum_and_gradient(self.params, self.state, microbatch, draws)
            sums.append((float(total), float(weight)))
            gradients = gradient if gradients is None else jax.tree.map(jnp.add, gradients, gradient)
        total, weight = np.sum(np.asarray(sums, np.float64), axis=0)
        if not weight:  # there is no mean to follow
            self.state, self.step_number = before, self.step_number + 1
            return 0.0, 0.0, {path: np.zeros(leaf.shape, np.float32) for path, leaf in self.params.items()}
        mean = {
            path: np.asarray(g, jnp.promote_types(g.dtype, jnp.float32)) / float(weight)
            for path, g in (gradients or {}).items()
        }
        norm = float(np.sqrt(sum(np.sum(np.square(np.abs(widened(g)))) for g in mean.values())))
        if self._clip_norm is not None and norm > self._clip_norm:
            mean = {path: g * float(self._clip_norm / norm) for path, g in mean.items()}
        self.params, self.opt_state = self._update(self.params, self.opt_state, jax.device_put(mean, self._device))
        self.step_number += 1
        return float(total / weight), norm, mean

    def _initialise(self, layer: Layer, key: jax.Array) -> tuple[Leaves, Leaves]:
        if layer.values is not None:
            copy = jax.device_put(layer.values, self._device, may_alias=False)
            return {p: copy[p] for p in layer.params}, {p: copy[p] for p in layer.state}
        params, state = jax.jit(layer.initialise)(key, jnp.uint32(path_hash(layer.path)))
        return params, state

    @cached_property
    def _sum_and_gradient(self) -> Any:
        def total(params: Leaves, state: Leaves, batch: Batch, draws: Any) -> Any:
            whole = {**params, **{path: params[owner] for path, owner in self._owner.items()}}
            value: Any = batch[self._input]
            for layer in self._layers:
                value, after = layer(whole, state, value, batch, Randomness(*draws), train=True)
                state = {**state, **after}
            loss, weight = self._loss(value, batch)
            return jnp.asarray(loss, scalar_dtype()), (jnp.asarray(weight, scalar_dtype()), state)

        return jax.jit(jax.value_and_grad(total, has_aux=True))

    @cached_property
    def _update(self) -> Any:
        def update(params: Leaves, opt_state: Any, gradients: Leaves) -> tuple[Leaves, Any]:
            like = {path: gradients[path].astype(leaf.dtype) for path, leaf in params.items()}
            updates, opt_state = self._optimizer.update(like, opt_state, params)
            return optax.apply_updates(params, updates), opt_state

        return jax.jit(update)
