"""First values of parameters, and the logical axes of their dims."""

from flax import nnx
from flax.typing import Initializer

# Logical axes of parameters; meshpipe.sharding says which mesh axis each one is split over.
EMBED, HEADS, HIDDEN, VOCAB = "embed", "heads", "hidden", "vocab"


def kernel_init(*axes: str | None, scale: float = 1.0) -> Initializer:
    """Normal with standard deviation `scale` / sqrt(fan-in), for a kernel with these logical axes."""
    return nnx.with_partitioning(nnx.initializers.variance_scaling(scale**2, "fan_in", "truncated_normal"), axes)


def embedding_init(stddev: float, vocab_size: int | None = None) -> Initializer:
    """Normal, for the features of tokens. The tensor axis splits the tokens, unless `vocab_size` is given and odd, as
    GPT-2's 50,257 is: then every device of the axis has all of them.
    """
    vocab = VOCAB if vocab_size is None or vocab_size % 2 == 0 else None
    return nnx.with_partitioning(nnx.initializers.normal(stddev), (vocab, EMBED))


def ones_init(*axes: str | None) -> Initializer:
    return nnx.with_partitioning(nnx.initializers.ones_init(), axes)


def zeros_init(*axes: str | None) -> Initializer:
    return nnx.with_partitioning(nnx.initializers.zeros_init(), axes)
