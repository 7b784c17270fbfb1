"""Values are read in slices to their places, whatever dtype, order of dims and sharding they have."""

import json
from collections.abc import Callable
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from einops import rearrange
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from meshpipe.weights import reading
from meshpipe.weights.entry import Entry
from meshpipe.weights.reading import Source, read_leaves, read_region
from meshpipe.weights.tensor_file import read_header

SHAPE = (6, 40, 512)
"""Of the leaf: 491 kB in float32."""
TENSORS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "": lambda leaf: leaf,
    "(heads head_dim) embed -> embed heads head_dim": lambda leaf: rearrange(leaf, "e h d -> (h d) e"),
    "embed (2 heads head_dim) -> heads head_dim embed": lambda leaf: rearrange(
        np.stack([np.zeros_like(leaf), leaf]), "part h d e -> e (part h d)"
    ),
}
"""By the dims of an entry, what is the tensor of a leaf."""
NAMES = {np.dtype(ml_dtypes.bfloat16): "BF16", np.dtype(np.float16): "F16", np.dtype(np.float32): "F32"}
BFLOAT16 = ml_dtypes.bfloat16


def written(folder: Path, values: np.ndarray) -> Path:
    file = folder / "model.safetensors"
    entry = {"dtype": NAMES[values.dtype], "shape": values.shape, "data_offsets": [0, values.nbytes]}
    header = json.dumps({"t": entry}).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + values.tobytes())
    return file


@pytest.mark.parametrize(
    "split", [PartitionSpec(), PartitionSpec("a"), PartitionSpec(None, "a"), PartitionSpec("a", "b")]
)
@pytest.mark.parametrize(
    ("stored", "kept"),
    [
        (BFLOAT16, np.float32),
        (BFLOAT16, BFLOAT16),
        (np.float16, np.float32),
        (np.float32, np.float32),
        (np.float32, BFLOAT16),
    ],
)
@pytest.mark.parametrize("dims", TENSORS)
def test_slices(
    split: PartitionSpec, stored: type, kept: type, dims: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "PIECE", 150_000)
    monkeypatch.setattr(reading, "MOST_SLICE", 70_000)
    values = np.random.default_rng(0).standard_normal(SHAPE, np.float32).astype(stored)
    file, expected = written(tmp_path, TENSORS[dims](values)), values.astype(kept)
    source = Source(Entry("t", "leaf", dims, part=1), read_header(file)["t"])
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("a", "b"))
    wanted = jax.ShapeDtypeStruct(expected.shape, kept, sharding=NamedSharding(mesh, split))
    found = read_leaves({"leaf": source}, {"leaf": wanted})["leaf"]
    assert found.sharding == wanted.sharding
    for shard in found.addressable_shards:
        np.testing.assert_array_equal(np.asarray(shard.data), expected[shard.index])
    part = (slice(1, 5), slice(2, 39), *(slice(3, 30),) * (expected.ndim - 2))
    np.testing.assert_array_equal(read_region(source, wanted, part), expected[part])
