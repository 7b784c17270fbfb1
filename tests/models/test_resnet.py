"""The residual network's layers, its data, and the recipes that train it."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from meshpipe.data import Digits
from meshpipe.layers.examine import abstract_layers
from meshpipe.models import ResNetConfig
from recipes import resnet as recipes

LAYOUTS = ("data", "pipeline", "pipeline_data", "pipeline_tensor")


def test_resolution_halves_where_the_width_doubles():
    def outputs(x: Any) -> list[Any]:
        found = []
        for make in ResNetConfig(width=4, num_blocks=2).layers():
            x = make(rngs=nnx.Rngs(0))(x)
            found.append(x)
        return found

    with nnx.use_eager_sharding(False):
        shapes = [output.shape for output in jax.eval_shape(outputs, jnp.zeros((2, 8, 8, 1)))]
    assert shapes == [(2, 8, 8, 4), (2, 8, 8, 4), (2, 4, 4, 8), (2, 10)]


def test_every_parameter_names_its_logical_axes():
    for layer in abstract_layers(ResNetConfig().layers(), ()):
        assert {path: len(axes) for path, axes in layer.axes.items()} == {
            p: len(v.shape) for p, v in layer.params.items()
        }


def test_every_digit_is_in_one_part_and_each_part_has_all_ten():
    train, held_out = Digits(held_out=False), Digits(held_out=True)
    assert (len(train), len(held_out)) == (1437, 360)
    assert {int(held_out[i]["labels"]) for i in range(60)} == set(range(10))
    image = train[0]["images"]
    assert (image.shape, image.dtype, float(image.min()), float(image.max())) == ((8, 8, 1), np.float32, 0.0, 1.0)
    assert repr(train) != repr(held_out)


def test_without_scikit_learn_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    from meshpipe.data import digits

    digits._load.cache_clear()
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ValueError, match=r"not installed. Install it: pip install 'meshpipe\[digits\]'"):
        Digits(held_out=True)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [({"width": 0}, "`width` must be at least 1"), ({"momentum": 1.0}, "`momentum`")],
)
def test_sizes_that_cannot_be(sizes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        ResNetConfig(**sizes)


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_trains_the_same_thing(name: str):
    base, layout = recipes.single(), getattr(recipes, name)()
    assert layout == dataclasses.replace(base, mesh=layout.mesh)
    for axis in ("pipeline", "data", "tensor"):
        assert (getattr(layout.mesh, axis) > 1) == (axis in name.split("_"))


@pytest.mark.slow
def test_it_reads_digits_that_it_has_not_seen(tmp_path: Path):
    """A linear classifier of these images reaches 0.96; with its statistics wrong in evaluation, the network fails."""
    metrics = tmp_path / "metrics.jsonl"
    command = [sys.executable, "-m", "meshpipe", "train", "resnet:pipeline_data", "--metrics", str(metrics)]
    run = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    (evaluation,) = [r for r in map(json.loads, metrics.read_text().splitlines()) if r.get("event") == "eval"]
    assert evaluation["accuracy"] > 0.97
