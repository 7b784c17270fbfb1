"""The user's uncut model as one plain model. It shares no code with the layers, whose training it judges."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from meshpipe.errors import kind_of
from meshpipe.loss_term import LossTerm
from meshpipe.models.reference import Reference
from meshpipe.reference.correspondence import Key, correspond, text, trains
from meshpipe.reference.plain import Leaves, LossInputs


class UncutModel:
    """The model of a `Reference`, whose leaves are named as the leaves of the layers that they correspond to.

    `params` and `state` are the leaves of the layers, in the order of the layers; those that are `frozen` have no
    gradient. A leaf of the model that no layer has
    keeps its own value, and the path that it has in the model, in parentheses, as its name. `named` are the outputs
    that the loss reads by name. Adapters of the layers are added to the kernels of the model, so that nothing of how
    the layers compute them is used. Raises `ValueError` when a leaf of the layers corresponds to none of the model, or
    a path names nothing.
    """

    def __init__(
        self,
        reference: Reference,
        layers: Sequence[Any],
        params: Mapping[str, Any],
        state: Mapping[str, Any],
        *,
        input: str,
        named: Collection[str],
        seed: int,
        tied: Sequence[Sequence[str]],
        frozen: Collection[str] = (),
    ):
        self._named = frozenset(named)
        self._call = reference.call or (lambda model, batch: model(batch[input]))
        with nnx.use_eager_sharding(False):
            model = reference.model if isinstance(reference.model, nnx.Module) else reference.model(nnx.Rngs(seed))
            if not isinstance(model, nnx.Module):
                raise ValueError(
                    f"A reference must be an nnx.Module or a constructor of one. Got a {type(model).__name__}. "
                    "Put the model itself into meshpipe.Reference(...)."
                )
            self._class_name = type(model).__name__
            self._graphdef, structure = nnx.split(model)
        self._variables = dict(nnx.to_flat_state(structure))
        own = {k: v for k, v in self._variables.items() if not isinstance(v, nnx.RngState)}
        leaves = {**params, **state}
        adapters = {} if reference.adapter_scale is None else adapters_of(leaves)
        factors = {path for pair in adapters.values() for path in pair}
        base = {path: leaf for path, leaf in leaves.items() if path not in factors}
        places = correspond(model, own, layers, base, reference.paths, tied)
        owners: dict[Key, str] = {}
        for path, (key, _) in places.items():
            owners.setdefault(key, path)
        self._names = {key: owners.get(key, f"({text(key)})") for key in own}
        copies = {self._names[k]: jnp.copy(jax.device_put(_array(v), jax.devices()[0])) for k, v in own.items()}
        owned_by = {path: group[0] for group in tied for path in group[1:]}
        self.names: Mapping[str, str] = {
            **{path: self._names[key] for path, (key, _) in places.items()},
            **{path: owned_by.get(path, path) for path in factors},
        }
        params_of = frozenset(self._names[key] for key, variable in own.items() if trains(variable))
        trained = params_of.union(self.names[path] for path in factors)
        self.trained = trained.difference(self.names[path] for path in frozen)
        self._scale = reference.adapter_scale or 0.0
        self._adapters = {self.names[kernel]: tuple(self.names[p] for p in pair) for kernel, pair in adapters.items()}
        """By name of a kernel, those of the two factors of what is added to it."""
        self.initial: Leaves = {
            self.names[path]: copies[self.names[path]] for path, (_, same) in places.items() if same
        }
        self.kept: Leaves = {name: leaf for name, leaf in copies.items() if name not in self.names.values()}
        self.splits = len(params_of) < len(own)

    def run(self, params: Leaves, state: Leaves, batch: Mapping[str, Any], draws: Any) -> tuple[LossInputs, Leaves]:
        model = self._made({**state, **params})
        output, sown = nnx.capture(self._call, LossTerm)(model, batch)
        after = dict(nnx.to_flat_state(nnx.state(model)))
        for key, variable in self._variables.items():
            if isinstance(variable, nnx.RngCount) and isinstance(_array(after[key]), jax.core.Tracer):
                raise ValueError(
                    "A reference must not draw random numbers: the layers' draws depend on their paths, which it does "
                    f"not have. Got a model that draws from {text(key[:-1])}. Set the rate of dropout to 0 in the "
                    "layers and the reference; without `reference`, verify compares dropout too."
                )
        written = {n: _array(after[k]) for k, n in self._names.items() if k in after and n not in self._adapters}
        return self._loss_inputs(output, _terms(sown)), written

    def _loss_inputs(self, output: Any, terms: Mapping[str, Any]) -> LossInputs:
        if not self._named:
            return LossInputs(output, {}, terms)
        if isinstance(output, tuple) and len(output) == 2 and isinstance(output[1], Mapping):
            if output[1].keys() == self._named:
                return LossInputs(*output, terms)
            got = f"a dict of {', '.join(map(repr, output[1])) or 'nothing'}"
        else:
            got = kind_of(output)
        names = ", ".join(f"{name!r}: ..." for name in sorted(self._named))
        raise ValueError(
            "A reference must return what the loss reads: its output, and a dict of the outputs that it reads by name. "
            f"Got {got}. Write meshpipe.Reference(model, call=lambda model, microbatch: (output, {{{names}}}))."
        )

    def after_step(self, params: Leaves, state: Leaves) -> Leaves:
        model = self._made({**state, **params})
        for _, part in nnx.iter_modules(model, graph=True):
            if hasattr(part, "after_step"):
                part.after_step()
        after = dict(nnx.to_flat_state(nnx.state(model)))
        return {
            name: _array(after[key])
            for key, name in self._names.items()
            if name in state.keys() - self._adapters.keys()
        }

    def _made(self, values: Leaves) -> nnx.Module:
        variables = []
        for name, (a, b) in self._adapters.items():
            kernel = values[name]
            change = jnp.reshape(jnp.tensordot(values[a], values[b], 1) * self._scale, kernel.shape)
            values = {**values, name: kernel + change.astype(kernel.dtype)}
        for key, variable in self._variables.items():
            value = values[self._names[key]] if key in self._names else _array(variable)
            variables.append((key, variable.replace(value) if isinstance(variable, nnx.Variable) else value))
        return nnx.merge(self._graphdef, nnx.from_flat_state(variables))

    def describe(self) -> str:
        return f"the uncut {self._class_name}" + (", adapters in its kernels" if self._adapters else "")


def adapters_of(leaves: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """By the path of a kernel among the leaves, the paths of the two factors of its adapter."""
    found = {}
    for path in leaves:
        module, _, factor = path.rpartition("/lora/")
        kernel = next((k for name in ("kernel", "embedding") if (k := f"{module}/{name}") in leaves), None)
        if factor == "lora_a" and kernel is not None:
            found[kernel] = path, f"{module}/lora/lora_b"
    return found


def adapters_add_to_kernels(leaves: Mapping[str, Any]) -> bool:
    """Whether the product of the factors of every adapter is a change of its kernel: not where some of its dims are
    neither inputs nor outputs, or outputs come first.
    """
    return all(
        (*leaves[a].shape[:-1], *leaves[b].shape[1:]) == leaves[kernel].shape
        and leaves[a].shape[-1] == leaves[b].shape[0]
        for kernel, (a, b) in adapters_of(leaves).items()
    )


def _terms(sown: nnx.State) -> dict[str, Any]:
    """The terms of the loss in what a model sowed, by name: sums over arrays, calls and modules."""
    terms: dict[str, Any] = {}
    for key, variable in nnx.to_flat_state(sown):
        parts = [jnp.asarray(part, jnp.result_type(float)).sum() for part in jax.tree.leaves(variable.get_value())]
        terms[str(key[-1])] = sum(parts, terms.get(str(key[-1]), 0.0))
    return terms


def _array(variable: Any) -> Any:
    return variable.get_value() if isinstance(variable, nnx.Variable) else variable
