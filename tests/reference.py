"""Training as anyone would write it with NNX and Optax on one device, to compare with; the engine is not used."""

import zlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

SEED = 3


class Reference:
    """Ordinary modules, `jax.value_and_grad` of the batch's mean loss, an Optax update.

    Random streams get the keys that are documented: of seed, leaf path, step and microbatch. Only models with random
    streams or batch statistics are run microbatch by microbatch; all others take the batch whole.
    """

    def __init__(self, layers, loss, transformation, params, *, num_microbatches=1, tied=(), input="inputs"):
        with nnx.use_eager_sharding(False):
            made = nnx.List([layer(rngs=nnx.Rngs(0)) for layer in layers])
        self.graphdef, everything, self.streams, self.state = nnx.split(made, nnx.Param, nnx.RngState, ..., graph=True)
        self.owner = {path: group[0] for group in tied for path in group[1:]}
        self.params = {self.path(key): jnp.asarray(params[self.path(key)]) for key, _ in nnx.to_flat_state(everything)}
        self.structure = everything
        for path in self.owner:
            del self.params[path]
        self.loss, self.input, self.tx = loss, input, transformation
        self.parts = num_microbatches if jax.tree.leaves((self.streams, self.state)) else 1
        self.opt_state = transformation.init(self.params)
        self.step_number = 0
        self.total = jax.jit(jax.value_and_grad(self._total, has_aux=True))

    @staticmethod
    def path(key):
        return "/".join(("layers", *map(str, key)))

    def _modules(self, params, state, draws):
        step, microbatch = draws
        flat = [
            (k, v.replace(params[self.owner.get(self.path(k), self.path(k))]))
            for k, v in nnx.to_flat_state(self.structure)
        ]
        streams = []
        for k, v in nnx.to_flat_state(self.streams):
            key = jax.random.fold_in(jax.random.key(SEED), 1)
            for data in (zlib.crc32(self.path(k).encode()), step, microbatch):
                key = jax.random.fold_in(key, data)
            streams.append((k, v.replace(key if isinstance(v, nnx.RngKey) else jnp.uint32(0))))
        return nnx.merge(
            self.graphdef, nnx.from_flat_state(flat), nnx.from_flat_state(streams), jax.tree.map(jnp.asarray, state)
        )

    def _total(self, params, state, batch, draws):
        layers = self._modules(params, state, draws)
        value = batch[self.input]
        for layer in layers:
            named = type(layer).__call__.__annotations__
            value = layer(value, **{name: batch[name] for name in batch if name in named and name != self.input})
        total, weight = self.loss(value, batch)
        return total, (weight, nnx.split(layers, nnx.Param, nnx.RngState, ..., graph=True)[3])

    def step(self, batch):
        """One update; returns the loss and the gradients by leaf path."""
        rows = [{k: np.split(v, self.parts)[m] for k, v in batch.items()} for m in range(self.parts)]
        totals, weights, sums = 0.0, 0.0, None
        for m, row in enumerate(rows):
            draws = (jnp.uint32(self.step_number), jnp.uint32(m))
            (total, (weight, self.state)), gradients = self.total(self.params, self.state, row, draws)
            totals, weights = totals + total, weights + weight
            sums = gradients if sums is None else jax.tree.map(jnp.add, sums, gradients)
        gradients = jax.tree.map(lambda g: g / weights, sums)
        updates, self.opt_state = self.tx.update(gradients, self.opt_state, self.params)
        self.params = optax.apply_updates(self.params, updates)
        self.step_number += 1
        return float(totals / weights), gradients
