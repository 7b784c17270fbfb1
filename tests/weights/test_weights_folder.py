"""Folders of weights are read by the tables, in full and in the parts that a process needs."""

from typing import Any

import golden
import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from meshpipe.layers.examine import abstract_layers
from meshpipe.weights import WeightsFolder, reading, tensor_file
from meshpipe.weights.architectures import differences, read_config, write_config
from meshpipe.weights.fields import Fields

NAMES = tuple(golden.CONFIGS)


def shapes(model: Any) -> dict[str, Any]:
    return {path: leaf for layer in abstract_layers(model.layers(), None) for path, leaf in layer.params.items()}


def placed(leaves: dict[str, Any], spec: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """The leaves on two devices, with a sharding by shape."""
    mesh = Mesh(np.array(jax.devices("cpu")[:2]), ("tensor",))
    return {
        path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec(leaf.shape)))
        for path, leaf in leaves.items()
    }


def by_dim(dim: int) -> Any:
    def spec(shape: tuple[int, ...]) -> PartitionSpec:
        names: list[str | None] = [None] * len(shape)
        if dim < len(shape) and shape[dim] % 2 == 0:
            names[dim] = "tensor"
        return PartitionSpec(*names)

    return spec


@pytest.mark.parametrize("name", NAMES)
def test_config_is_that_of_the_model(name: str) -> None:
    found = WeightsFolder(golden.FOLDER / name)
    assert found.model == golden.CONFIGS[name]
    assert not differences(read_config(Fields(write_config(found.model), "written")), found.model)


# Of each, at least once: a dim of all kinds of leaves in parts, and pieces of a part.
@pytest.mark.parametrize(
    ("name", "dim"),
    [("llama2", 0), ("llama3", 1), ("mistral", 2), ("qwen2", 1), ("qwen3", 0), ("gemma2", 2), ("gpt2", 1)],
)
def test_leaves_in_parts_are_those_of_the_files(name: str, dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if dim == 1:  # pieces of few bytes, read row by row
        monkeypatch.setattr(reading, "PIECE", 200)
        monkeypatch.setattr(tensor_file, "_SHORTEST_RUN", 16)
    folder = WeightsFolder(golden.FOLDER / name)
    wanted = placed(shapes(folder.model), by_dim(dim))
    folder.check(wanted)
    found = folder.read(wanted)
    expected = golden.leaves(name)
    assert found.keys() == expected.keys()
    for path, leaf in found.items():
        assert leaf.sharding == wanted[path].sharding
        np.testing.assert_array_equal(leaf, expected[path], err_msg=path)
