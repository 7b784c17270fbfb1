"""The files of shards: what a process writes of a leaf, in which chunks, and that all of it is written by somebody."""

import math

import jax
import numpy as np
import pytest
from saved_trees import on, trees

from meshpipe.checkpoint.chunks import chunk_count, chunk_shape, chunks_in, overlap, whole
from meshpipe.checkpoint.index import index_leaves
from meshpipe.checkpoint.shards import all_files, hold_shards, own_files
from meshpipe.mesh import make_mesh, submeshes


def test_one_process_has_all_files():
    index, items = index_leaves(trees())
    assert own_files(hold_shards(items), index).keys() == all_files(index)


def test_bytes_do_not_change_with_donated_arrays():
    (mesh,) = submeshes(make_mesh(data=2))
    array = on(mesh, np.arange(1 << 18, dtype=np.float32), "data")
    expected = np.asarray(array).tobytes()
    index, items = index_leaves([{"params": {"x": array}}])
    shards = hold_shards(items)
    del items
    overwrite = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
    for _ in range(3):
        array = overwrite(array)
    array.block_until_ready()
    files = own_files(shards, index)
    assert b"".join(files[f"stage_0/params.x/{i}"].read() for i in range(2)) == expected


CHUNKS = {
    "small": ((8, 8), (8, 4), [8, 4]),
    "scalar": ((), (), []),
    "empty": ((0, 8), (0, 8), [0, 8]),
    "rows by a divisor": ((64, 8), (32, 8), [16, 8]),
    "rows that nothing divides, not sharded": ((37, 8), (37, 8), [13, 8]),
    "rows that nothing divides, sharded": ((74, 4), (37, 4), [37, 4]),
    "rows larger than a chunk": ((2, 1024), (1, 1024), [1, 128]),
    "rows larger than a chunk, sharded": ((2, 2048), (2, 1024), [1, 128]),
}


@pytest.mark.parametrize(("shape", "shard", "expected"), CHUNKS.values(), ids=CHUNKS)
def test_chunks_of_at_most_512_bytes(shape, shard, expected):
    chunk = chunk_shape(shape, shard, 4, largest=512)
    assert chunk == expected
    for size, part, cut in zip(shape, shard, chunk, strict=True):
        assert part == size or part % cut == 0  # no chunk crosses shards


def test_any_chunks_cover_the_array_and_never_cross_shards():
    random = np.random.default_rng(0)
    for _ in range(300):
        parts = random.integers(1, 4, 3)
        shard = [int(n) for n in random.integers(1, 40, 3)]
        shape = [int(n * p) for n, p in zip(shard, parts, strict=True)]
        chunk = chunk_shape(shape, shard, 4, largest=int(random.integers(4, 4000)))
        covered = np.zeros(shape, int)
        names = set()
        for name, part in chunks_in(whole(shape), shape, chunk):
            covered[part] += 1
            names.add(name)
            crossed = [p.start // n == (p.stop - 1) // n for p, n in zip(part, shard, strict=True)]
            assert all(crossed)
            inner = tuple(slice(p.start % n, p.start % n + p.stop - p.start) for p, n in zip(part, shard, strict=True))
            assert np.empty(shard)[inner].flags.c_contiguous
        assert covered.min() == covered.max() == 1
        assert (
            len(names) == chunk_count(shape, chunk) == math.prod(-(-s // c) for s, c in zip(shape, chunk, strict=True))
        )


def test_overlap():
    assert overlap((slice(0, 4), slice(2, 6)), (slice(3, 9), slice(0, 3))) == (slice(3, 4), slice(2, 3))
    assert overlap((slice(0, 4),), (slice(4, 9),)) is None
    assert overlap((), ()) == ()
