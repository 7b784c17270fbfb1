"""Keys and values of the positions so far, which attention keeps while text is generated."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int


class KeyValueCache(nnx.Module):
    """The keys and values of one attention, for `slots` positions of every text; it is there in generation only.

    Position p is in slot p modulo `slots`. So an attention with a window needs no more slots than the window, and a
    position that is written again, or has never been written, is never read: see `mask`.
    """

    def __init__(
        self, shape: tuple[int, int, int, int], axes: tuple[str | None, str | None, str | None, str | None], dtype: str
    ) -> None:
        """`shape` is `[batch, slots, kv_heads, head_dim]`; `axes` has the logical axis of each of these dims."""
        with nnx.use_eager_sharding(False):
            self.keys = nnx.Cache(jnp.zeros(shape, dtype), out_sharding=axes)
            self.values = nnx.Cache(jnp.zeros(shape, dtype), out_sharding=axes)

    def write(
        self,
        keys: Float[Array, "batch seq kv_heads head_dim"],
        values: Float[Array, "batch seq kv_heads head_dim"],
        positions: Int[Array, "batch seq"],
    ) -> None:
        """Keeps a new position of every text, or the beginning of every text: its positions from 0 on, of which the
        last is repeated to the end of the row.
        """
        for variable, new in ((self.keys, keys), (self.values, values)):
            old = variable[...]
            if new.shape[1] == 1:
                slots = positions[:, 0] % old.shape[1]
                variable[...] = jax.vmap(_put)(old, new.astype(old.dtype), slots)
            else:
                source = jnp.clip(self._held(positions.max(axis=1)), 0, new.shape[1] - 1)
                variable[...] = jnp.take_along_axis(new.astype(old.dtype), source[:, :, None, None], axis=1)

    def mask(self, positions: Int[Array, "batch 1"], window: int | None) -> Bool[Array, "batch 1 1 slots"]:
        """The slots that the next position of every text attends to, once it is written."""
        held = self._held(positions[:, 0])
        seen = held >= 0
        if window is not None:
            seen &= held > positions - window
        return seen[:, None, None, :]

    def _held(self, last: Int[Array, " batch"]) -> Int[Array, "batch slots"]:
        """The position in each slot of a text that was written up to `last`; below 0 where there is none."""
        slots = self.keys[...].shape[1]
        return last[:, None] - (last[:, None] - jnp.arange(slots)) % slots


def _put(
    rows: Float[Array, "slots kv_heads head_dim"], new: Float[Array, "1 kv_heads head_dim"], slot: Int[Array, ""]
) -> Float[Array, "slots kv_heads head_dim"]:
    zero = jnp.zeros_like(slot)  # of one dtype, also with jax_enable_x64
    return jax.lax.dynamic_update_slice(rows, new, (slot, zero, zero))
