"""`meshpipe.load`: what was trained, from a checkpoint of any layout, without a trainer."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small_model
import tiny_recipes
from flax import nnx

import meshpipe
from meshpipe import Checkpointer, CheckpointError, PipelineConfig, Trainer, make_mesh
from meshpipe.runs.record import config_values

ROOT = Path(__file__).resolve().parents[1]
LAYERS = small_model.LAYERS


@pytest.fixture(scope="module")
def trainer() -> Trainer:
    made = Trainer(
        LAYERS,
        small_model.loss,
        optax.adam(1e-2),
        batch=small_model.batches(1)[0],
        mesh=make_mesh(2, 2, 2),
        pipeline=PipelineConfig(num_microbatches=2),
    )
    made.step(small_model.batches(1)[0])
    return made


@pytest.fixture(scope="module")
def saved(trainer: Trainer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Step 1 with other values than step 4, which are those of the trainer."""
    folder = tmp_path_factory.mktemp("run")
    with Checkpointer(folder) as checkpointer:
        trees = trainer.state_tree()
        zeros: Any = jax.tree.map(jnp.zeros_like, trees)
        checkpointer.save(1, zeros, {})
        checkpointer.save(4, trees, {"seed": 3})
    return folder


def test_values_come_by_leaf_path_from_every_stage_and_shard(trainer: Trainer, saved: Path) -> None:
    found = meshpipe.load(saved)
    expected = {**trainer.params, **trainer.state}
    assert found.keys() == expected.keys()
    for path, value in expected.items():
        np.testing.assert_array_equal(found[path], value)
        assert found[path].dtype == value.dtype
        assert found[path].devices() == {jax.devices()[0]}
    assert not any(np.asarray(value).any() for value in meshpipe.load(str(saved), step=1).values())
    (device,) = meshpipe.load(saved, device=jax.devices()[3])["layers/0/linear/kernel"].devices()
    assert device == jax.devices()[3]


def test_layers_are_modules_with_the_values(trainer: Trainer, saved: Path) -> None:
    (batch,) = small_model.batches(1)
    enter, mix, center, mix_again, leave = meshpipe.load(saved, layers=LAYERS)
    shift = jnp.asarray(batch["shift"])
    output = leave(mix_again(center(mix(enter(jnp.asarray(batch["inputs"])), shift)), shift))
    found = trainer.predict(batch)
    np.testing.assert_allclose(found, output, rtol=0, atol=64 * np.finfo(np.float32).eps * np.abs(output).max())
    assert mix.drop.deterministic
    assert not meshpipe.load(saved, layers=LAYERS, train=True)[1].drop.deterministic


def test_ready_made_layers_stay_as_they_are(trainer: Trainer, saved: Path) -> None:
    with nnx.use_eager_sharding(False):
        given = [layer(rngs=nnx.Rngs(7)) for layer in LAYERS]
    before = np.array(given[0].linear.kernel[...])
    loaded = meshpipe.load(saved, layers=given)
    np.testing.assert_array_equal(given[0].linear.kernel[...], before)
    np.testing.assert_array_equal(loaded[0].linear.kernel[...], trainer.params["layers/0/linear/kernel"])


def test_the_folder_of_a_run_is_that_of_its_checkpoints(trainer: Trainer, saved: Path, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").symlink_to(saved)
    found = meshpipe.load(tmp_path)
    np.testing.assert_array_equal(found["layers/0/linear/bias"], trainer.params["layers/0/linear/bias"])


def test_tied_leaves_are_one_variable(tmp_path: Path) -> None:
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, [{"params": {f"layers/{i}/kernel": jnp.ones((2, 2)) for i in (0, 1)}}], {})
    layers = [lambda rngs: nnx.Linear(2, 2, use_bias=False, rngs=rngs)] * 2
    first, second = meshpipe.load(tmp_path, layers=layers, tied=[("layers/0/kernel", "layers/1/kernel")])
    assert first.kernel is second.kernel
    first, second = meshpipe.load(tmp_path, layers=layers)
    assert first.kernel is not second.kernel
    with pytest.raises(ValueError, match="'layers/0/bias', which is none"):
        meshpipe.load(tmp_path, layers=layers, tied=[("layers/0/kernel", "layers/0/bias")])


def test_leaves_that_do_not_fit_are_named(saved: Path) -> None:
    class Wider(small_model.Leave):
        def __init__(self, rngs: nnx.Rngs):
            super().__init__(rngs)
            self.linear = nnx.Linear(small_model.WIDTH, 4, rngs=rngs)

    class More(small_model.Leave):
        def __init__(self, rngs: nnx.Rngs):
            super().__init__(rngs)
            self.scale = nnx.Param(jnp.ones(3))

    with pytest.raises(CheckpointError, match=r"params/layers/4/linear/bias is float32\[3\] in step 4; asked for"):
        meshpipe.load(saved, layers=[*LAYERS[:4], Wider])
    with pytest.raises(CheckpointError, match="params/layers/4/scale is not in step 4"):
        meshpipe.load(saved, layers=[*LAYERS[:4], More])
    with pytest.raises(CheckpointError, match=r"params/layers/4/embed/embedding of step 4 in .* does not"):
        meshpipe.load(saved, layers=LAYERS[:4])


def test_what_is_not_there_or_damaged_is_named(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="which is not a folder"):
        meshpipe.load(tmp_path / "missing")
    with pytest.raises(CheckpointError, match="which has none"):
        meshpipe.load(tmp_path)
    with pytest.raises(CheckpointError, match=r"Got 3. Complete steps there: 1, 4\."):
        meshpipe.load(saved, step=3)
    with pytest.raises(CheckpointError, match=r"Pass '.*' and step 4\."):
        meshpipe.load(saved / "4")
    copy = tmp_path / "copy"
    shutil.copytree(saved, copy)
    (file,) = (copy / "4").glob("stage_*/params.layers.0.linear.bias/0")
    file.write_bytes(bytes(file.stat().st_size))
    with pytest.raises(CheckpointError, match=r"leaf params/layers/0/linear/bias.*The newest good step is 1"):
        meshpipe.load(copy)


def test_no_program_is_compiled(saved: Path) -> None:
    """Reading and placing values takes no program of XLA."""
    source = (
        "import sys, jax, meshpipe\n"
        "compiled = []\n"
        "jax.monitoring.register_event_duration_secs_listener(\n"
        "    lambda name, seconds, **rest: compiled.append(name) if 'backend_compile' in name else None)\n"
        "found = meshpipe.load(sys.argv[1])\n"
        "assert len(found) == 21, len(found)\n"
        "assert not compiled, compiled\n"
    )
    subprocess.run([sys.executable, "-c", source, str(saved)], check=True, timeout=120, cwd=ROOT)


RECIPE = f"""
import sys
sys.path.insert(0, {str(ROOT / "tests")!r})
from dataclasses import replace
import tiny_recipes


def mine() -> tiny_recipes.Config:
    return tiny_recipes.pipeline()
"""


def save_run(folder: Path, file: Path, model: tiny_recipes.DenseConfig, **metadata: Any) -> None:
    layers = [layer(nnx.Rngs(0)) for layer in model.layers()]
    params = {
        f"layers/{i}/linear/{name}": getattr(layer.linear, name)[...]
        for i, layer in enumerate(layers)
        for name in ("kernel", "bias")
    }
    config = config_values(tiny_recipes.replace(tiny_recipes.pipeline(), model=model))
    with Checkpointer(folder) as checkpointer:
        checkpointer.save(1, [{"params": params}], {"recipe": f"{file}:mine", "config": config} | metadata)


def test_the_layers_of_the_recipe_are_those_that_were_saved(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(RECIPE)
    save_run(tmp_path / "run", file, tiny_recipes.DenseConfig(depth=3, width=5))
    modules = meshpipe.load(tmp_path / "run", layers="recipe")
    assert len(modules) == 3
    assert modules[0](np.ones((2, 5), np.float32)).shape == (2, 5)


def test_a_recipe_that_has_changed_is_no_longer_that_of_the_checkpoint(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(RECIPE)
    model = tiny_recipes.DenseConfig()
    values = config_values(tiny_recipes.replace(tiny_recipes.pipeline(), model=model))
    save_run(tmp_path / "other", file, model, config={**values, "model": {**values["model"], "heads": 2}})
    with pytest.raises(CheckpointError, match=r"heads of .*mine.py:mine is None, and .* was saved with 2"):
        meshpipe.load(tmp_path / "other", layers="recipe")
    save_run(tmp_path / "kind", file, model, config={**values, "model": {"type": "Wide"}})
    with pytest.raises(CheckpointError, match=r"mine has DenseConfig, and .* was saved with 'Wide'"):
        meshpipe.load(tmp_path / "kind", layers="recipe")
    save_run(tmp_path / "none", file, model, recipe=None)
    with pytest.raises(CheckpointError, match=r"was not saved by a command. Pass the `layers` themselves"):
        meshpipe.load(tmp_path / "none", layers="recipe")
    save_run(tmp_path / "unnamed", file, model, recipe="run")
    with pytest.raises(CheckpointError, match=r"name 'run': it was saved by meshpipe.run without a recipe's `name`"):
        meshpipe.load(tmp_path / "unnamed", layers="recipe")


def test_a_field_that_the_version_which_saved_it_lacked_has_its_default(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(RECIPE)
    values = config_values(tiny_recipes.pipeline())
    del values["model"]["depth"]
    save_run(tmp_path / "run", file, tiny_recipes.DenseConfig(), config=values)
    assert len(meshpipe.load(tmp_path / "run", layers="recipe")) == 4
    changed = "replace(tiny_recipes.pipeline(), model=tiny_recipes.DenseConfig(depth=3))"
    file.write_text(RECIPE.replace("tiny_recipes.pipeline()", changed))
    with pytest.raises(CheckpointError, match=r"depth of .*mine.py:mine is 3, and .* was saved with None"):
        meshpipe.load(tmp_path / "run", layers="recipe")


@pytest.mark.slow
def test_a_run_of_the_command_is_loaded_with_its_flags(tmp_path: Path) -> None:
    command = f"-m meshpipe train {ROOT / 'tests' / 'tiny_recipes.py'}:pipeline --model.depth 3 --steps 2 --run-dir run"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    subprocess.run([sys.executable, *command.split()], check=True, timeout=120, cwd=tmp_path, env=environment)
    values = meshpipe.load(tmp_path / "run")
    modules = meshpipe.load(tmp_path / "run", layers="recipe")
    assert len(modules) == 3
    for i, module in enumerate(modules):
        np.testing.assert_array_equal(module.linear.kernel[...], values[f"layers/{i}/linear/kernel"])
