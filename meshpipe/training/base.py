"""The base of a run, its parameters that are not trained, and the digest that tells it from others.

The digest depends on paths, shapes, dtypes and bits, and not on how arrays are sharded or cut into stages: the hash of
an array is a sum, in whole numbers, over its elements, so that every device sums its own.
"""

import hashlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp

from meshpipe.compiler.compiler import Compiler
from meshpipe.layers.layer import Leaves
from meshpipe.processes.agreement import AGREE_SECONDS
from meshpipe.processes.group import Group
from meshpipe.sharding import local_value, replicated

_SALTS = (0x9E3779B9, 0x7F4A7C15)
_DIMS = 0x2545F491


def digest_of_leaves(leaves: Leaves, group: Group) -> str:
    """A digest of arrays by leaf path, 32 hexadecimal digits.

    Every process of the group calls it with the leaves of its own stages, and gets that of all.
    """
    ordered = dict(sorted(leaves.items()))
    compiler = Compiler()
    with ThreadPoolExecutor() as pool:
        programs = list(pool.map(lambda leaf: _program(leaf, compiler), ordered.values()))
    sums = [program(leaf) for program, leaf in zip(programs, ordered.values(), strict=True)]
    lines = {
        path: f"{leaf.dtype} {list(leaf.shape)} {' '.join(f'{value:08x}' for value in local_value(found))}"
        for (path, leaf), found in zip(ordered.items(), sums, strict=True)
    }
    if not group.is_alone:
        lines = {path: line for part in _gathered(lines, group) for path, line in part.items()}
    text = "\n".join(f"{path} {line}" for path, line in sorted(lines.items()))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _gathered(lines: Mapping[str, str], group: Group) -> list[dict[str, str]]:
    text = "\n".join(f"{path}\t{line}" for path, line in lines.items())
    of_all = group.gather("digest of the base", text, AGREE_SECONDS)
    return [dict(line.split("\t", 1) for line in part.splitlines()) for part in of_all]


def _program(leaf: jax.Array, compiler: Compiler) -> Callable[[jax.Array], jax.Array]:
    """What hashes a leaf where it is; leaves that are alike share one, also those of several submeshes."""
    sharding = leaf.sharding
    if not isinstance(sharding, jax.sharding.NamedSharding):
        return jax.jit(_sums)
    mesh: Any = sharding.mesh
    shape = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    lowered = jax.jit(_sums, out_shardings=replicated(mesh)).lower(shape)
    return compiler.compile(lowered, mesh)


def _sums(leaf: jax.Array) -> jax.Array:
    """Sums of 32 bits, whose overflow is meant: they are the same in any order."""
    if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
        leaf = jnp.stack([leaf.real, leaf.imag])
    if leaf.dtype == jnp.bool_:
        leaf = leaf.astype(jnp.uint8)
    bits = jax.lax.bitcast_convert_type(leaf, jnp.dtype(f"uint{min(32, 8 * leaf.dtype.itemsize)}")).astype(jnp.uint32)
    place = jnp.uint32(0)
    for dim in range(bits.ndim):
        place = place * jnp.uint32(_DIMS) + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, dim)
    return jnp.stack([_mixed(bits ^ _mixed(place + jnp.uint32(salt))).sum(dtype=jnp.uint32) for salt in _SALTS])


def _mixed(bits: jax.Array) -> jax.Array:
    """The last rounds of MurmurHash3: every bit of the result depends on every bit."""
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x85EBCA6B)
    bits = (bits ^ (bits >> 13)) * jnp.uint32(0xC2B2AE35)
    return bits ^ (bits >> 16)
