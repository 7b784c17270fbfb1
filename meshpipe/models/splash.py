"""Attention by the Pallas kernel for TPUs that JAX ships (splash attention): no scores in memory."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from meshpipe.mesh import DATA, TENSOR

LANES = 128
"""The kernel works on tiles of this many positions; sequences are padded to a multiple of it."""

BLOCKS = (512, 384, 256, LANES)
"""Lengths of the blocks that one step of the kernel reads; the longest that divides a sequence is taken. Short blocks
read keys and values from memory more often, and longer ones do not fit the vector memory with large heads."""

Kernel = Callable[[jax.Array, jax.Array, jax.Array, Any], jax.Array]


def splash_attention(
    query: Float[Array, "batch seq heads head_dim"],
    key: Float[Array, "batch seq2 kv_heads head_dim"],
    value: Float[Array, "batch seq2 kv_heads head_dim"],
    *,
    causal: bool,
    segment_ids: Int[Array, "batch seq"] | None,
    window: int | None,
    softcap: float | None,
    scale: float | None,
    interpret: bool = False,
) -> Float[Array, "batch seq heads head_dim"]:
    """The same as `meshpipe.models.attention.attend`, whose arguments these are. Documents are told apart inside the
    kernel, by their ids.

    To be traced with the mesh set that it is for. Each device computes the examples and heads of its own: XLA cannot
    partition a kernel by itself. With `interpret`, the kernel runs on any device, slowly.
    """

    def attend(query: jax.Array, key: jax.Array, value: jax.Array, ids: jax.Array | None = None) -> jax.Array:
        queries, keys = query.shape[1], key.shape[1]
        padded = -(-queries // LANES) * LANES, -(-keys // LANES) * LANES
        kernel: Kernel = _kernel(query.shape[2], *padded, causal, window, softcap, interpret)
        query_ids, key_ids = ids, ids
        if keys < padded[1] and not (causal and queries <= keys) and ids is None:
            # Otherwise real queries would attend to padding.
            query_ids, key_ids = (jnp.zeros((query.shape[0], n), jnp.int32) for n in (queries, keys))
        factor = query.shape[-1] ** -0.5 if scale is None else scale
        operands = (
            _padded(query * jnp.asarray(factor, query.dtype), padded[0]),
            _padded(key, padded[1]),
            _padded(value, padded[1]),
        )
        q, k, v = (rearrange(x, "batch seq heads dim -> batch heads seq dim") for x in operands)
        if query_ids is None or key_ids is None:
            mixed = jax.vmap(lambda q, k, v: kernel(q, k, v, None))(q, k, v)
        else:
            # An id that no document has keeps padding to itself.
            ids_of = _ids(_padded(query_ids, padded[0], -1), _padded(key_ids, padded[1], -1))
            mixed = jax.vmap(kernel)(q, k, v, ids_of)
        return rearrange(mixed, "batch heads seq dim -> batch seq heads dim")[:, :queries]

    operands: Any = [query, key, value] if segment_ids is None else [query, key, value, segment_ids]
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return attend(*operands)
    batch = DATA if query.shape[0] % mesh.shape.get(DATA, 1) == 0 and DATA in mesh.shape else None
    heads, copies = _heads_axis(query.shape[2], key.shape[2], mesh.shape.get(TENSOR, 1))
    # A device whose query heads share a head of keys with another's reads a copy of it.
    operands[1:3] = (jnp.repeat(x, copies, axis=2) if copies > 1 else x for x in operands[1:3])
    spec = PartitionSpec(batch, None, heads, None)
    specs = (spec, spec, spec, PartitionSpec(batch, None))[: len(operands)]
    return jax.shard_map(attend, in_specs=specs, out_specs=spec, check_vma=False)(*operands)


def _heads_axis(heads: int, kv_heads: int, size: int) -> tuple[str | None, int]:
    """The axis that heads are split over, and how often each head of keys and values is repeated for that."""
    if size == 1 or heads % size:
        return None, 1
    if kv_heads % size == 0:
        return TENSOR, 1
    return (TENSOR, size // kv_heads) if size % kv_heads == 0 else (None, 1)


def _padded(x: jax.Array, length: int, value: int = 0) -> jax.Array:
    """With positions of this value added at the end."""
    missing = length - x.shape[1]
    widths = [(0, missing if dim == 1 else 0) for dim in range(x.ndim)]
    return jnp.pad(x, widths, constant_values=value) if missing else x


def _ids(query_ids: jax.Array, key_ids: jax.Array) -> Any:
    from jax.experimental.pallas.ops.tpu.splash_attention import SegmentIds

    return SegmentIds(q=query_ids, kv=key_ids)


def _kernel(
    heads: int, queries: int, keys: int, causal: bool, window: int | None, softcap: float | None, interpret: bool
) -> Kernel:
    # Pallas takes a fifth of a second to import, and only TPUs need it.
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    shape = queries, keys
    mask: Any
    if window is not None:
        mask = splash.LocalMask(shape, (window - 1, 0 if causal else None), 0)
    else:
        mask = splash.CausalMask(shape) if causal else splash.FullMask(shape)
    q, kv = (next(block for block in BLOCKS if length % block == 0) for length in shape)
    return splash.make_splash_mha(
        splash.MultiHeadMask([mask] * heads),
        block_sizes=splash.BlockSizes(
            block_q=q,
            block_kv=kv,
            block_kv_compute=kv,
            block_q_dkv=q,
            block_kv_dkv=kv,
            block_kv_dkv_compute=kv,
            block_q_dq=q,
            block_kv_dq=kv,
        ),
        attn_logits_soft_cap=softcap,
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
