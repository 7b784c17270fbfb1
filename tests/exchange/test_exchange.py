"""Weights go in and out with every bit, and what goes with them."""

import json
import resource
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import golden
import jax
import ml_dtypes
import numpy as np
import pytest

from meshpipe import Checkpointer, load
from meshpipe.errors import ArgumentError
from meshpipe.exchange.exporting import export_weights
from meshpipe.exchange.importing import import_weights
from meshpipe.weights import WeightsFolder, model_of
from meshpipe.weights.tensor_file import read_header
from meshpipe.weights.writing import Outline, write_file

NAMES = tuple(golden.CONFIGS)


def tensors(folder: Path) -> dict[str, np.ndarray]:
    """Read by the library safetensors; it has no bfloat16 for NumPy, so bits are compared."""
    safetensors = pytest.importorskip("safetensors")
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        for name, entry in safetensors.deserialize(file.read_bytes()):
            found[name] = np.frombuffer(entry["data"], np.uint8), entry["dtype"], tuple(entry["shape"])
    return found


def assert_same_bits(folder: Path, other: Path) -> None:
    found, expected = tensors(folder), tensors(other)
    assert found.keys() == expected.keys()
    for name, (data, dtype, shape) in found.items():
        assert (dtype, shape) == expected[name][1:]
        np.testing.assert_array_equal(data, expected[name][0], err_msg=name)


@pytest.mark.parametrize("name", NAMES)
def test_import_and_export_keep_every_bit(name: str, tmp_path: Path) -> None:
    folder = golden.FOLDER / name
    assert import_weights(folder, tmp_path / "imported") == golden.CONFIGS[name]
    assert model_of(tmp_path / "imported") == golden.CONFIGS[name]
    found, expected = load(tmp_path / "imported"), golden.leaves(name)
    assert found.keys() == expected.keys()
    for path, leaf in found.items():
        np.testing.assert_array_equal(leaf, expected[path], err_msg=path)
    export_weights(tmp_path / "imported", tmp_path / "exported", largest_file=10_000 if name == "mistral" else 1 << 30)
    assert_same_bits(tmp_path / "exported", folder)
    assert json.loads((tmp_path / "exported/config.json").read_text()) == json.loads(
        (folder / "config.json").read_text()
    )
    for file in folder.iterdir():
        if file.suffix in (".json", ".jinja") and file.name not in ("config.json", "model.safetensors.index.json"):
            assert (tmp_path / "exported" / file.name).read_bytes() == file.read_bytes()


def half(folder: Path, to: Path, dtype: np.dtype) -> None:
    """A copy with tensors of another dtype, the final norm excepted."""
    shutil.copytree(folder, to)
    (to / "model.safetensors").unlink()
    found = golden.tensors(folder.name)
    made = {name: value.astype(np.float32 if name == "model.norm.weight" else dtype) for name, value in found.items()}
    outlines = [Outline(name, value.shape, value.dtype) for name, value in made.items()]
    write_file(to / "model.safetensors", outlines, lambda name: made[name])
    config = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps({**config, "torch_dtype": str(dtype)}))


@pytest.mark.parametrize("dtype", [np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)])
def test_shorter_dtypes_come_back(dtype: np.dtype, tmp_path: Path) -> None:
    half(golden.FOLDER / "llama3", tmp_path / "half", dtype)
    import_weights(tmp_path / "half", tmp_path / "imported")
    found = load(tmp_path / "imported")
    assert {leaf.dtype for leaf in found.values()} == {np.dtype(np.float32)}
    expected = golden.tensors("llama3")["model.embed_tokens.weight"].astype(dtype).astype(np.float32)
    np.testing.assert_array_equal(found["layers/0/embedding"], expected)
    export_weights(tmp_path / "imported", tmp_path / "exported")
    assert_same_bits(tmp_path / "exported", tmp_path / "half")
    export_weights(tmp_path / "imported", tmp_path / "wide", dtype="float32")
    assert {tensor.dtype for tensor in read_header(tmp_path / "wide/model.safetensors").values()} == {np.dtype("f4")}
    assert json.loads((tmp_path / "wide/config.json").read_text())["torch_dtype"] == "float32"


@pytest.mark.parametrize("name", NAMES)
def test_a_model_from_scratch_gets_a_config(name: str, tmp_path: Path) -> None:
    import_weights(golden.FOLDER / name, tmp_path / "imported")
    shutil.rmtree(tmp_path / "imported/pretrained")
    export_weights(tmp_path / "imported", tmp_path / "exported")
    assert_same_bits(tmp_path / "exported", golden.FOLDER / name) if name != "mistral" else None
    assert WeightsFolder(tmp_path / "exported").model == golden.CONFIGS[name]
    # For transformers, this field of GPT-2 is its number of positions.
    config = json.loads((tmp_path / "exported/config.json").read_text())
    assert ("max_position_embeddings" in config) == (name != "gpt2")


def test_nothing_is_left_of_an_export_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import_weights(golden.FOLDER / "gpt2", tmp_path / "imported")
    leaf = next((tmp_path / "imported/0").glob("stage_0/*wpe*"), None) or next(
        (tmp_path / "imported/0").glob("stage_0/*positions*")
    )
    chunk = next(file for file in leaf.iterdir() if file.name != ".zarray")
    chunk.write_bytes(chunk.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(ValueError, match="is damaged"):
        export_weights(tmp_path / "imported", tmp_path / "exported")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["imported"]


@contextmanager
def full_disk() -> Iterator[None]:
    """No file may have more than 600 bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (600, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path: Path) -> None:
    import_weights(golden.FOLDER / "gpt2", tmp_path / "imported")
    for to in ("one", "deep/er"):
        with full_disk(), pytest.raises(ArgumentError, match=r"`to` must be a folder with room .*File too large"):
            export_weights(tmp_path / "imported", tmp_path / to)
        with full_disk(), pytest.raises(ArgumentError, match=r"`to` must be a folder with room .*File too large"):
            import_weights(golden.FOLDER / "gpt2", tmp_path / to)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["imported"]


def test_a_saved_layout_does_not_matter(tmp_path: Path) -> None:
    """Leaves of several stages, in shards of several devices, give the same files."""
    leaves = golden.leaves("qwen3")
    mesh = jax.sharding.Mesh(np.array(jax.devices("cpu")[:2]), ("x",))
    by_rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    placed = {path: jax.device_put(value, by_rows) for path, value in leaves.items()}
    first = {path: leaf for path, leaf in placed.items() if path.startswith(("layers/0", "layers/1"))}
    trees = [{"params": first}, {"params": {path: leaf for path, leaf in placed.items() if path not in first}}]
    import_weights(golden.FOLDER / "qwen3", tmp_path / "imported")
    metadata = {**Checkpointer(tmp_path / "imported").metadata(0), "step": 7}
    with Checkpointer(tmp_path / "other") as checkpointer:
        checkpointer.save(7, trees, metadata)
    export_weights(tmp_path / "other", tmp_path / "exported")
    assert_same_bits(tmp_path / "exported", golden.FOLDER / "qwen3")
