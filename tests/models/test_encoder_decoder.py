"""The encoder-decoder's layers and data, and the recipes that train it."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from meshpipe.data import ReversedTextConfig
from meshpipe.layers.examine import abstract_layers
from meshpipe.models import EncoderDecoderConfig
from meshpipe.models.encoder_decoder import DecoderBlock
from recipes import encoder_decoder as recipes

TINY = EncoderDecoderConfig(d_model=8, num_heads=2, num_encoder_blocks=1, num_decoder_blocks=1)
LAYOUTS = ("data", "pipeline", "pipeline_data", "pipeline_tensor")


def test_the_decoder_sees_what_was_written_so_far_and_all_of_the_memory():
    rng = np.random.default_rng(0)
    x, memory = (jnp.asarray(rng.normal(size=(1, 4, 8)), jnp.float32) for _ in range(2))
    with nnx.use_eager_sharding(False):
        block = DecoderBlock(TINY, rngs=nnx.Rngs(0))
    before = block(x, memory)
    later = block(x.at[:, 2].add(1), memory)
    np.testing.assert_allclose(before[:, :2], later[:, :2], rtol=1e-6)
    assert not np.allclose(before[:, 2:], later[:, 2:], atol=1e-3)
    elsewhere = block(x, memory.at[:, 3].add(1))
    assert not np.allclose(before[:, 0], elsewhere[:, 0], atol=1e-3)


def test_targets_are_the_window_backwards(tmp_path: Path):
    (tmp_path / "text.txt").write_bytes(bytes(range(1, 41)))
    source = ReversedTextConfig(path=str(tmp_path / "text.txt"), sequence_length=4).train_source()
    example = source[1]
    assert {name: list(field) for name, field in example.items()} == {
        "source": [5, 6, 7, 8],
        "targets": [8, 7, 6, 5],
        "inputs": [0, 8, 7, 6],
    }
    assert "ReversedWindows(PackedWindows(" in repr(source)


def test_every_parameter_names_its_logical_axes():
    for layer in abstract_layers(TINY.layers(), None):
        assert {path: len(axes) for path, axes in layer.axes.items()} == {
            p: len(v.shape) for p, v in layer.params.items()
        }


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"num_encoder_blocks": 0}, "`num_encoder_blocks` must be at least 1"),
        ({"d_model": 37}, "multiple of `num_heads`"),
    ],
)
def test_sizes_that_cannot_be(sizes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        EncoderDecoderConfig(**sizes)


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_trains_the_same_thing(name: str):
    base, layout = recipes.single(), getattr(recipes, name)()
    assert layout == dataclasses.replace(base, mesh=layout.mesh, pipeline=layout.pipeline)
    for axis in ("pipeline", "data", "tensor"):
        assert (getattr(layout.mesh, axis) > 1) == (axis in name.split("_"))


@pytest.mark.slow
def test_it_writes_text_backwards_that_it_has_not_seen(tmp_path: Path):
    """Without the memory, the next byte of source text costs more than 1.5 nats, whatever the model."""
    metrics = tmp_path / "metrics.jsonl"
    command = [sys.executable, "-m", "meshpipe", "train", "encoder_decoder:pipeline", "--metrics", str(metrics)]
    run = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    (evaluation,) = [r for r in map(json.loads, metrics.read_text().splitlines()) if r.get("event") == "eval"]
    assert evaluation["loss"] < 0.4
    assert evaluation["accuracy"] > 0.9
