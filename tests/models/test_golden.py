"""Published models compute what `transformers` computes with the same weights, at every layout."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import golden
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from meshpipe import PipelineConfig, Trainer, make_mesh, verify

NAMES = tuple(golden.CONFIGS)
LAYOUTS: dict[str, tuple[int, int, int]] = {
    "pipeline": (2, 1, 1),
    "pipeline_tensor": (2, 1, 2),
    "pipeline_data": (2, 2, 1),
}


@nnx.jit
def call(layers: list[nnx.Module], inputs: jax.Array) -> jax.Array:
    x: Any = inputs
    for layer in layers:
        x = layer(x)
    return x


def batch(name: str, rows: int) -> dict[str, np.ndarray]:
    """The golden tokens, repeated to fill the rows."""
    ids = np.resize(golden.expected(name)["ids"], (rows, 16))
    return {
        "inputs": ids,
        "targets": np.roll(ids, -1, axis=1),
        "segment_ids": np.zeros_like(ids),
        "weights": np.ones(ids.shape, np.float32),
    }


def test_every_folder_is_tested() -> None:
    assert {folder.name for folder in golden.FOLDER.iterdir()} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_logits_on_one_device(name: str) -> None:
    expected = golden.expected(name)
    logits = call(golden.modules(name), jnp.asarray(expected["ids"]))
    np.testing.assert_allclose(logits, expected["logits"], rtol=0, atol=golden.TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", NAMES)
def test_logits_at_every_layout(name: str, layout: str) -> None:
    config, given = golden.CONFIGS[name], batch(name, 6 * 4)
    trainer = Trainer(
        golden.modules(name),
        config.loss,
        optax.sgd(0.0),
        batch=given,
        mesh=make_mesh(*LAYOUTS[layout]),
        pipeline=PipelineConfig(num_microbatches=4),
        tied=config.tied(),
    )
    expected = np.resize(golden.expected(name)["logits"], (6 * 4, 16, 288))
    np.testing.assert_allclose(trainer.predict(given), expected, rtol=0, atol=golden.TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen2", "gemma2", "gemma3", "gpt2"])
def test_training_equals_training_on_one_device(name: str) -> None:
    config = golden.CONFIGS[name]
    given = batch(name, 8) | {"segment_ids": np.asarray([[0] * 6 + [1] * 10] * 8, np.int32)}
    report = verify(
        golden.modules(name),
        config.loss,
        optax.adam(1e-3),
        batches=[given] * 2,
        mesh=make_mesh(2, 2, 2),
        pipeline=PipelineConfig(num_microbatches=2, schedule="zb-h1"),
        tied=config.tied(),
    )
    assert report.ok, report


@pytest.mark.slow
def test_transformers_makes_the_same_folders(tmp_path: Path) -> None:
    for package in ("torch", "transformers", "tokenizers"):
        pytest.importorskip(package)
    script = Path(__file__).with_name("make_golden.py")
    subprocess.run([sys.executable, script, tmp_path], check=True, timeout=300)
    for name in NAMES:
        before, after = golden.FOLDER / name, tmp_path / name
        assert {file.name for file in before.iterdir()} == {file.name for file in after.iterdir()}
        for file in before.glob("*.safetensors"):
            assert file.read_bytes() == (after / file.name).read_bytes(), file
        for file in before.glob("*.json"):
            assert _without_version(file) == _without_version(after / file.name), file
        with np.load(after / "expected.npz") as made:
            expected = golden.expected(name)
            assert set(made) == set(expected)
            for field in ("ids", "prompt_lengths", "continuation"):
                np.testing.assert_array_equal(made[field], expected[field])
            np.testing.assert_allclose(made["logits"], expected["logits"], rtol=0, atol=golden.TOLERANCE)


def _without_version(file: Path) -> Any:
    found = json.loads(file.read_text())
    return {key: value for key, value in found.items() if key != "transformers_version"}
