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
from meshpipe.layers.sown import add_sums, objective_of, sums_of_sown
from meshpipe.optimizer.sums import LOSS, WEIGHT, metric_sums
from meshpipe.stage.spec import StageFunction, StageOutput

Loss = Callable[..., tuple[jax.Array, jax.Array]]
"""Output of the last layer, the microbatch and, by keyword, named outputs -> sum of losses, weight."""
Metrics = Callable[..., Mapping[str, tuple[jax.Array, jax.Array]]]
"""The same -> further sums and weights to report in evaluation."""

_RESERVED = frozenset({"loss", "step", "event", "eval_time_s"})
"""Names that metrics must not have: the results of an evaluation and the metrics file use them."""


def stage_function(
    stage: int,
    layers: Sequence[Layer],
    *,
    input: str | None,
    loss: Loss | None,
    metrics: Metrics | None = None,
    policies: Sequence[Callable[..., bool] | None] = (),
    unread: set[tuple[str, str]] | None = None,
    train: bool,
) -> StageFunction:
    """The function of a stage that the engine traces.

    `input` is the batch field that the first stage reads, and None for the others. `loss` is None for all stages but
    the last, which has the sum of the losses, their weight, and the sums and weights of `metrics`, and hands on no
    value. `policies` say what `jax.checkpoint` saves of each layer, of the last one together with the loss;
    None saves all. What layers sow is added up unless `unread` is None; what nothing reads of it is named there, by
    class of the layer and name. Errors of layers, loss and metrics get a note with the layer's path and the shapes.
    """
    streams = streams_of(layers)

    def sums(value: Any, batch: Mapping[str, Any]) -> dict[str, Any]:
        assert loss is not None
        extra = {} if metrics is None else _metrics(metrics, value, batch)
        total, weight = _loss(loss, value, batch)
        return {LOSS: total, WEIGHT: weight, **metric_sums(extra)}

    def run(params: Any, state: Any, values: tuple[Any, ...], batch: Any, randomness: Any) -> StageOutput:
        value = values[0] if input is None else batch[input]
        seed, paths, step, microbatch = randomness
        draws = Randomness(seed, step, microbatch, {path: paths[i] for i, path in enumerate(streams)})

        def call(index: int, params: Any, state: Any, value: Any) -> tuple[Any, Any, dict[str, Any]]:
            layer = layers[index]
            with call_of_layer(layer.path, layer.class_name, stage, value, train=train):
                keywords = {keyword: batch[field] for keyword, field in layer.fields.items()}
                value, after, sown = layer(params, state, value, keywords, draws, train=train)
            _check_output(layer, value)
            found = sums_of_sown(sown, layer, batch, unread) if unread is not None else {}
            if loss is None or index < len(layers) - 1:
                return value, after, found
            return None, after, add_sums(found, sums(value, batch))

        found: dict[str, Any] = {}
        for index, layer in enumerate(layers):
            run_layer: Callable[..., tuple[Any, Any, dict[str, Any]]] = partial(call, index)
            if policies and policies[index] is not None:
                run_layer = jax.checkpoint(run_layer, policy=policies[index])
                value = jax.tree.map(_stored, value) if index > 0 else value
            value, after, of_layer = run_layer(_part(params, layer.params), _part(state, layer.state), value)
            found = add_sums(found, of_layer)
            state = {**state, **after}
        if loss is None:
            return StageOutput((value,), found, objective_of(found), state)
        found = found if layers else sums(value, batch)
        return StageOutput((), found, objective_of(found), state)

    return run


def _part(values: Mapping[str, Any], paths: Iterable[str]) -> dict[str, Any]:
    return {path: values[path] for path in paths}


def _stored(leaf: Any) -> Any:
    """The input of a layer that is recomputed. Named, it is no result of operations that backward may repeat, so it is
    stored itself, and not what it could be computed from.
    """
    return checkpoint_name(leaf, "layer input") if isinstance(leaf, jax.Array) else leaf


def streams_of(layers: Sequence[Layer]) -> list[str]:
    """The paths of the random streams of layers, in order."""
    return [path for layer in layers for path in layer.streams]


def _loss(loss: Loss, value: Any, batch: Mapping[str, Any]) -> tuple[Any, Any]:
    with call_of_loss("loss", value, batch):
        result = loss(value, batch)
    if not _is_pair_of_scalars(result):
        raise ValueError(
            "A loss must return two scalars: the sum of the losses over the microbatch, and their weight (how many "
            f"there are). Got {spell(result)}. Write e.g. `return losses.sum(), losses.size`."
        )
    if any(jnp.iscomplexobj(v) for v in result):
        dtypes = [jnp.result_type(v).name for v in result]
        raise ValueError(f"A loss and its weight must be real. Got {dtypes}. Write e.g. jnp.abs(error) ** 2.")
    return result[0], result[1]


def _metrics(metrics: Metrics, value: Any, batch: Mapping[str, Any]) -> Mapping[str, tuple[Any, Any]]:
    with call_of_loss("metrics", value, batch):
        result = metrics(value, batch)
    if not isinstance(result, Mapping) or not all(
        isinstance(n, str) and _is_sum_and_weight(v) for n, v in result.items()
    ):
        raise ValueError(
            "Metrics must return a dict with a pair of scalars by name: a sum over the microbatch, and its weight. "
            f'Got {spell(result)}. Write e.g. `return {{"accuracy": (hits.sum(), hits.size)}}`.'
        )
    if taken := _RESERVED.intersection(result):
        raise ValueError(
            f"A metric must not have one of the names {', '.join(sorted(_RESERVED))}. Got {', '.join(sorted(taken))}."
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
