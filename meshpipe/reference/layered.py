"""The layers, called in order, as one plain model."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from meshpipe.layers.after_step import run_after_step
from meshpipe.layers.layer import Layer, Randomness, path_hash
from meshpipe.layers.wiring import Output, Wiring, get, outputs_of
from meshpipe.reference.plain import Leaves, LossInputs


class LayeredModel:
    """The user's layers called in their order; parameters that others own are taken from their owners.

    It returns all that the loss reads of them.
    """

    def __init__(self, layers: Sequence[Layer], wiring: Wiring, *, seed: int, tied: Sequence[Sequence[str]]):
        self._layers, self._wiring = layers, wiring
        owners = {path: group[0] for group in tied for path in group}
        self.names: Mapping[str, str] = {
            path: owners.get(path, path) for layer in layers for path in (*layer.params, *layer.state)
        }
        self.trained = frozenset(self.names[path] for layer in layers for path in layer.params)
        self.kept: Leaves = {}
        self.splits = any(layer.has_randomness or layer.own_state or layer.sows for layer in layers)
        with jax.default_device(jax.devices()[0]):
            made = {p: v for layer in layers for p, v in _initial(layer, jax.random.key(seed)).items()}
        self.initial: Leaves = {path: leaf for path, leaf in made.items() if self.names[path] == path}

    def run(self, params: Leaves, state: Leaves, batch: Mapping[str, Any], draws: Any) -> tuple[Any, Leaves]:
        leaves = {path: params[name] for path, name in self.names.items() if name in params}
        outputs: dict[Output, Any] = {}
        written = state | {path: state[name] for path, name in self.names.items() if name in state}
        terms: dict[str, Any] = {}
        for index, layer in enumerate(self._layers):
            value = get(self._wiring.inputs[index], batch, outputs)
            keywords = {k: get(source, batch, outputs) for k, source in self._wiring.keywords[index].items()}
            value, after, sown = layer(leaves, written, value, keywords, Randomness(*draws), train=True)
            outputs |= outputs_of(index, layer, value, sown)
            written |= after
            terms |= {name: terms.get(name, 0.0) + term for name, term in sown.terms.items()}
        return LossInputs(value, {k: outputs[output] for k, output in self._wiring.loss.items()}, terms), written

    def after_step(self, params: Leaves, state: Leaves) -> Leaves:
        leaves = {path: params[name] for path, name in self.names.items() if name in params}
        written: Leaves = {}
        for layer in self._layers:
            if layer.once:
                written |= run_after_step(layer, {**leaves, **{path: state[path] for path in layer.state}})
        return written

    def describe(self) -> str:
        return "the same layers one after the other"


def _initial(layer: Layer, key: jax.Array) -> Leaves:
    if layer.values is not None:
        return jax.tree.map(jnp.copy, jax.device_put(layer.values, jax.devices()[0]))
    params, state = jax.jit(layer.initialise)(key, jnp.uint32(path_hash(layer.path)))
    return {**params, **state}
