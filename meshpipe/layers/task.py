"""What is trained, independent of where and how: the layers, their loss and the shape of a batch."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

from jax.sharding import Mesh

from meshpipe.layers.layer import LayerLike
from meshpipe.layers.stage_function import Loss, Metrics
from meshpipe.layers.trainable import Trainable
from meshpipe.sharding import ShardingRules


@dataclass(frozen=True)
class Task:
    """A model and its loss. `Trainer` and `verify` make one of their arguments; so does a recipe's `Config.task`."""

    layers: Sequence[LayerLike]
    """The model: NNX modules, constructors that take `nnx.Rngs`, or functions such as `nnx.relu`. Each is called with
    the output of the one before it, any pytree of arrays."""
    loss: Loss
    """`loss(output, microbatch)` returns two scalars: the sum of the losses of a microbatch, and its weight, such as
    the number of examples or of unmasked tokens. The loss of a step is sum / weight over the whole batch."""
    _: KW_ONLY
    batch: Mapping[str, Any]
    """An example of a global batch, as arrays or `jax.ShapeDtypeStruct`s; only shapes and dtypes matter, unless
    layers are measured. Every field is `[batch, ...]`; `batch` must divide by the number of microbatches times the data
    axis."""
    input: str = "inputs"
    """The batch field that the first layer is called with."""
    metrics: Metrics | None = None
    """`metrics(output, microbatch)` returns further pairs `(sum, weight)` by name, which evaluation reports as
    sum / weight over all its batches. None reports the loss alone."""
    tied: Sequence[Sequence[str]] = ()
    """Groups of leaf paths that are one shared parameter, e.g. `[("layers/0/embedding", "layers/5/embedding")]`. The
    first path of a group owns it: its gradient is the sum over the group, and the others receive its new value."""
    trainable: Trainable = None
    """The parameters that are trained: patterns of leaf paths (`layers/3/*`, excluded with `!`), an NNX filter such as
    `nnx.LoRAParam`, or a list of both. The others are frozen. None trains all; in a model with `nnx.LoRAParam`, those
    alone."""
    notes: Callable[[Mesh], Sequence[str]] | None = None
    """`notes(mesh)` returns what to say about the model on the devices of a mesh, a sentence each; it raises
    `ValueError` when they cannot run it. None has nothing to say."""
    rules: ShardingRules = field(default_factory=ShardingRules)
    """Which mesh axis splits each logical axis of a parameter."""
