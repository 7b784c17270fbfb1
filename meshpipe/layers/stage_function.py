"""What one stage computes: its layers one after the other, and in the last stage the loss."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from meshpipe.layers.layer import Layer, Randomness
from meshpipe.layers.writes import WriteError
from meshpipe.stage.traced import StageFunction

Loss = Callable[[Any, Mapping[str, jax.Array]], tuple[jax.Array, jax.Array]]
"""Output of the last layer and the microbatch -> sum of losses, weight."""
Metrics = Callable[[Any, Mapping[str, jax.Array]], Mapping[str, tuple[jax.Array, jax.Array]]]
"""Output of the last layer and the microbatch -> further sums and weights to report in evaluation."""

_RESERVED = frozenset({"loss", "step", "event", "eval_time_s"})
"""What stands beside the metrics in the results of an evaluation, and in the metrics file."""


def stage_function(
    stage: int,
    layers: Sequence[Layer],
    *,
    input: str | None,
    loss: Loss | None,
    metrics: Metrics | None = None,
    names: list[str] | None = None,
    train: bool,
) -> StageFunction:
    """The function of a stage that the engine traces.

    `input` is the field of the batch that the first stage reads, and None for the others; `loss` is None for all but
    the last, whose value is the sum of the losses, their weight, and the sums and weights of `metrics`, whose names
    are put into `names`. Errors of layers and of the loss are raised again with the layer's path and the shapes.
    """
    streams = streams_of(layers)

    def run(params: Any, state: Any, activation: Any, batch: Any, randomness: Any) -> tuple[Any, Any]:
        value = activation if input is None else batch[input]
        seed, paths, step, microbatch = randomness
        draws = Randomness(seed, step, microbatch, {path: paths[i] for i, path in enumerate(streams)})
        for layer in layers:
            try:
                value, after = layer(params, state, value, batch, draws, train=train)
            except WriteError:
                raise
            except (TypeError, ValueError, KeyError) as error:
                shapes = jax.tree.map(lambda leaf: f"{leaf.dtype}{list(leaf.shape)}", value)
                raise ValueError(
                    f"Each layer must take what the one before returns. {layer.path} (stage {stage}) cannot take "
                    f"{shapes}: {error}"
                ) from error
            state = {**state, **after}
        if loss is not None:
            extra = metrics(value, batch) if metrics is not None else {}
            if taken := _RESERVED.intersection(extra):
                raise ValueError(
                    f"A metric must have a name of its own, none of {', '.join(sorted(_RESERVED))}. "
                    f"Got {', '.join(sorted(taken))}."
                )
            if names is not None:
                names[:] = list(extra)
            value = (*_loss(loss, value, batch), *(v for pair in extra.values() for v in pair))
        return value, state

    return run


def streams_of(layers: Sequence[Layer]) -> list[str]:
    """The paths of the random streams of layers, in order."""
    return [path for layer in layers for path in layer.streams]


def _loss(loss: Loss, value: Any, batch: Mapping[str, jax.Array]) -> tuple[Any, Any]:
    try:
        result = loss(value, batch)
    except (TypeError, ValueError, KeyError) as error:
        shapes = {name: f"{field.dtype}{list(field.shape)}" for name, field in batch.items()}
        raise ValueError(
            f"The loss must take the last layer's output and a microbatch, which has {shapes}. "
            f"Got {type(error).__name__}: {error}"
        ) from error
    if not isinstance(result, tuple | list) or len(result) != 2 or any(np.shape(v) for v in result):
        raise ValueError(
            "A loss must return two scalars: the sum of the losses over the microbatch, and their weight (how many "
            f"there are). Got {jax.tree.map(np.shape, result)}. Write e.g. `return losses.sum(), losses.size`."
        )
    if any(jnp.iscomplexobj(v) for v in result):
        dtypes = [jnp.result_type(v).name for v in result]
        raise ValueError(f"A loss and its weight must be real. Got {dtypes}. Write e.g. jnp.abs(error) ** 2.")
    return result[0], result[1]
