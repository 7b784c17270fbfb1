"""The function that a stage computes: its layers in order, and in the last stage the loss."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from meshpipe.errors import kind_of
from meshpipe.layers.explain import call_of_layer, call_of_loss, spell
from meshpipe.layers.layer import Layer, Randomness
from meshpipe.layers.reserved_names import RESERVED
from meshpipe.layers.sown import add_sums, objective_of, sums_of_sown
from meshpipe.layers.stage_wiring import Place, Received, StageWiring
from meshpipe.layers.wiring import Field, Output, outputs_of
from meshpipe.optimizer.sums import LOSS, WEIGHT, metric_sums
from meshpipe.stage.spec import StageFunction, StageOutput

Loss = Callable[..., tuple[jax.Array, jax.Array]]
"""Output of the last layer, the microbatch and, by keyword, named outputs -> sum of losses, weight."""
Metrics = Callable[..., Mapping[str, tuple[jax.Array, jax.Array]]]
"""The same -> further sums and weights to report in evaluation."""


def stage_function(
    stage: int,
    layers: Sequence[Layer],
    *,
    wiring: StageWiring,
    loss: Loss | None,
    metrics: Metrics | None = None,
    policies: Sequence[Callable[..., bool] | None] = (),
    outputs: bool = False,
    unread: set[tuple[str, str]] | None = None,
    train: bool,
) -> StageFunction:
    """The function of a stage that the engine traces.

    `wiring` says what each layer reads, and which layers make the values that are handed on; with `outputs`, the output
    of the last layer is one more. `loss` is None for all stages but the last, which has the sum of the losses, their
    weight, and the sums and weights of `metrics`. `policies` say what `jax.checkpoint` saves of each layer, of the last
    one together with the loss; None saves all. What layers sow is added up unless `unread` is None; what nothing reads
    of it is named there, by class of the layer and name. Errors of layers, loss and metrics get a note with the layer's
    path and the shapes.
    """
    streams, last, stored = streams_of(layers), len(layers) - 1, _stored_outputs(wiring, policies)

    def run(params: Any, state: Any, values: tuple[Any, ...], batch: Any, randomness: Any) -> StageOutput:
        seed, paths, step, microbatch = randomness
        draws = Randomness(seed, step, microbatch, {path: paths[i] for i, path in enumerate(streams)})
        made: dict[Output, Any] = {}  # of the layers so far
        get = partial(_value_at, batch=batch, values=values, made=made)

        def call(index: int, params: Any, state: Any, value: Any) -> tuple[dict[Output, Any], Any, dict[str, Any]]:
            layer = layers[index]
            with call_of_layer(layer.path, layer.class_name, stage, value, train=train):
                keywords = {keyword: get(place) for keyword, place in wiring.keywords[index]}
                value, after, sown = layer(params, state, value, keywords, draws, train=train)
            _check_output(layer, value)
            of_sown = sums_of_sown(sown, layer, batch, unread) if unread is not None else {}
            own = outputs_of(index, layer, value, sown)
            if loss is None or index < last:
                return own, after, of_sown
            # Inside of a checkpoint around the last layer, `made` does not have its outputs yet.
            named = [
                {k: own[place] if place in own else get(place) for k, place in given}
                for given in (wiring.loss, wiring.metrics)
            ]
            return {}, after, add_sums(of_sown, _sums(loss, metrics, value, batch, *named))

        found: dict[str, Any] = {}
        for index, layer in enumerate(layers):
            run_layer: Callable[..., tuple[dict[Output, Any], Any, dict[str, Any]]] = partial(call, index)
            if policies and policies[index] is not None:
                run_layer = jax.checkpoint(run_layer, policy=policies[index])
            value = get(wiring.inputs[index])
            own, after, of_layer = run_layer(_part(params, layer.params), _part(state, layer.state), value)
            found = add_sums(found, of_layer)
            made |= {output: jax.tree.map(_stored, v) if output in stored else v for output, v in own.items()}
            state = {**state, **after}
        handed_on = tuple(made[output] for output in (*wiring.outputs, *([Output(last)] if outputs else ())))
        return StageOutput(handed_on, found, objective_of(found), state)

    return run


def _value_at(place: Place, *, batch: Mapping[str, Any], values: Sequence[Any], made: Mapping[Output, Any]) -> Any:
    """What a stage has at a place: `values` are those that it was handed, `made` the outputs of its own layers."""
    if isinstance(place, Field):
        return batch[place.name]
    return values[place.index] if isinstance(place, Received) else made[place]


def _sums(
    loss: Loss,
    metrics: Metrics | None,
    value: Any,
    batch: Mapping[str, Any],
    of_loss: Mapping[str, Any],
    of_metrics: Mapping[str, Any],
) -> dict[str, Any]:
    """The loss, its weight and the metrics of a microbatch; `of_loss` and `of_metrics` have their named outputs."""
    total, weight = _loss(loss, value, batch, of_loss)
    extra = {} if metrics is None else _metrics(metrics, value, batch, of_metrics)
    return {LOSS: total, WEIGHT: weight, **metric_sums(extra)}


def _stored_outputs(wiring: StageWiring, policies: Sequence[Callable[..., bool] | None]) -> frozenset[Output]:
    """The outputs of layers of the stage that are read by others that are recomputed, of which the last one includes
    loss and metrics.
    """
    reads = [[place, *(p for _, p in given)] for place, given in zip(wiring.inputs, wiring.keywords, strict=True)]
    reads[-1] += [place for _, place in (*wiring.loss, *wiring.metrics)]
    recomputed = (places for places, policy in zip(reads, policies, strict=False) if policy is not None)
    return frozenset(place for places in recomputed for place in places if isinstance(place, Output))


def _part(values: Mapping[str, Any], paths: Iterable[str]) -> dict[str, Any]:
    return {path: values[path] for path in paths}


def _stored(leaf: Any) -> Any:
    """An input of a layer that is recomputed. Named, it is no result of operations that backward may repeat, so it is
    stored itself, and not what it could be computed from.
    """
    return checkpoint_name(leaf, "layer input") if isinstance(leaf, jax.Array) else leaf


def streams_of(layers: Sequence[Layer]) -> list[str]:
    """The paths of the random streams of layers, in order."""
    return [path for layer in layers for path in layer.streams]


def _loss(loss: Loss, value: Any, batch: Mapping[str, Any], named: Mapping[str, Any]) -> tuple[Any, Any]:
    with call_of_loss("loss", value, batch):
        result = loss(value, batch, **named)
    if not _is_pair_of_scalars(result):
        raise ValueError(
            "A loss must return two scalars: the sum of the losses over the microbatch, and their weight (how many "
            f"there are). Got {spell(result)}. Write e.g. `return losses.sum(), losses.size`."
        )
    if any(jnp.iscomplexobj(v) for v in result):
        dtypes = [jnp.result_type(v).name for v in result]
        raise ValueError(f"A loss and its weight must be real. Got {dtypes}. Write e.g. jnp.abs(error) ** 2.")
    return result[0], result[1]


def _metrics(
    metrics: Metrics, value: Any, batch: Mapping[str, Any], named: Mapping[str, Any]
) -> Mapping[str, tuple[Any, Any]]:
    with call_of_loss("metrics", value, batch):
        result = metrics(value, batch, **named)
    if not isinstance(result, Mapping) or not all(
        isinstance(n, str) and _is_sum_and_weight(v) for n, v in result.items()
    ):
        raise ValueError(
            "Metrics must return a dict with a pair of scalars by name: a sum over the microbatch, and its weight. "
            f'Got {spell(result)}. Write e.g. `return {{"accuracy": (hits.sum(), hits.size)}}`.'
        )
    if taken := RESERVED.intersection(result):
        raise ValueError(
            "A metric must not have a name that the results of a step or of an evaluation have. "
            f"Got {', '.join(sorted(taken))}. Rename it."
        )
    return result


def _is_sum_and_weight(result: Any) -> bool:
    return _is_pair_of_scalars(result) and not any(jnp.iscomplexobj(v) for v in result)


def _is_pair_of_scalars(result: Any) -> bool:
    return (
        isinstance(result, tuple | list) and len(result) == 2 and all(_is_array(v) and not np.shape(v) for v in result)
    )


def _check_output(layer: Layer, value: Any) -> None:
    wrong = [leaf for leaf in jax.tree.leaves(value) if not _is_array(leaf)]
    if wrong:
        raise ValueError(
            "A layer must return arrays, alone or in lists, tuples and dicts. "
            f"{layer.path} ({layer.class_name}) returned {kind_of(wrong[0])}."
        )


def _is_array(value: Any) -> bool:
    return isinstance(value, jax.Array | np.ndarray | np.generic | int | float | complex)
