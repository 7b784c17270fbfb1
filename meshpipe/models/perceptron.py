"""The perceptron of transformers: a layer of hidden units at every position."""

from flax import nnx
from jaxtyping import Array, Float

from meshpipe.models.initializers import EMBED, HIDDEN, kernel_init, zeros_init


def up_and_down(
    width: int, hidden: int, *, use_bias: bool = True, out_scale: float = 1.0, dtype: str, rngs: nnx.Rngs
) -> tuple[nnx.Linear, nnx.Linear]:
    """The projections of `width` features to the hidden units, and back."""
    up = nnx.Linear(
        width,
        hidden,
        use_bias=use_bias,
        dtype=dtype,
        kernel_init=kernel_init(EMBED, HIDDEN),
        bias_init=zeros_init(HIDDEN),
        rngs=rngs,
    )
    down = nnx.Linear(
        hidden,
        width,
        use_bias=use_bias,
        dtype=dtype,
        kernel_init=kernel_init(HIDDEN, EMBED, scale=out_scale),
        bias_init=zeros_init(EMBED),
        rngs=rngs,
    )
    return up, down


class Perceptron(nnx.Module):
    """Hidden units with GELU, in its tanh approximation."""

    def __init__(self, width: int, hidden: int, *, out_scale: float = 1.0, dtype: str, rngs: nnx.Rngs) -> None:
        self.up, self.down = up_and_down(width, hidden, out_scale=out_scale, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "batch seq embed"]) -> Float[Array, "batch seq embed"]:
        return self.down(nnx.gelu(self.up(x)))
