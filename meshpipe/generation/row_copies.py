"""Copies of what few texts have, their caches and newest tokens, to rows of a group of texts."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.sharding import Mesh
from jaxtyping import Array, Int, Shaped

from meshpipe.compiler.cache import CompileCache
from meshpipe.compiler.compiler import Compiler
from meshpipe.phases import each
from meshpipe.sharding import Arrays, Shapes, abstract, activation_sharding

_Put = Callable[[Arrays, Arrays, jax.Array], Arrays]


class RowCopies:
    """Puts new rows into arrays on the submeshes of stages, on each one program for all of its arrays.

    Arguments:
        kept: By stage: the mesh, and the arrays `[batch, ...]` with rows that stay as they are.
        new: By stage, arrays `[parts, ...]`: a new row for each part of the rows of a batch.
        donate: Whether the rows are put in place.
        what: What is copied, in words.
        cache: Of compiled programs.

    Everything is compiled when it is made.
    """

    def __init__(
        self,
        kept: dict[int, tuple[Mesh, Shapes]],
        new: dict[int, Shapes],
        *,
        parts: int,
        donate: bool,
        what: str,
        cache: CompileCache | None,
    ) -> None:
        compiler = Compiler(cache)

        def compiled(stage: int) -> Any:
            mesh, rows = kept[stage]
            put = jax.jit(
                _put, donate_argnums=(0,) if donate else (), out_shardings=tuple([own.sharding for own in rows])
            )
            slots = abstract((parts,), jnp.int32, activation_sharding(mesh, (parts,), parts))
            return compiler.compile(put.lower(rows, new[stage], slots), mesh)

        with ThreadPoolExecutor() as pool:
            building = {stage: pool.submit(compiled, stage) for stage, (_, rows) in kept.items() if rows}
            found = each(f"Compiling copies of {what},", "stage", list(building.items()))
            self._puts: dict[int, _Put] = {stage: future.result() for stage, future in found}

    def __call__(self, stage: int, kept: Arrays, new: Arrays, slots: jax.Array) -> Arrays:
        """The rows of a stage with `new[part]` as row `slots[part]` of each part, int32 `[parts]`; see `put_rows`."""
        return self._puts[stage](kept, new, slots) if kept else ()


def _put(kept: Arrays, new: Arrays, slots: jax.Array) -> Arrays:
    return tuple(put_rows(rows, own, slots) for rows, own in zip(kept, new, strict=True))


def put_rows(
    kept: Shaped[Array, "batch ..."], new: Shaped[Array, "parts ..."], slots: Int[Array, " parts"]
) -> Shaped[Array, "batch ..."]:
    """The rows with `new[part]` as row `slots[part]` of each part; none where that is past the last row of a part."""
    parts = rearrange(kept, "(parts rows) ... -> parts rows ...", parts=new.shape[0])
    written = jax.vmap(lambda rows, row, slot: rows.at[slot].set(row, mode="drop"))(parts, new, slots)
    return rearrange(written, "parts rows ... -> (parts rows) ...")
