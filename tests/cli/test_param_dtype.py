"""Weights in bfloat16 stay so below adapters and in use, and compute what they do in float32."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import golden
import jax
import ml_dtypes
import numpy as np
import pytest

from meshpipe import load
from meshpipe.cli import main
from meshpipe.exchange.importing import import_weights
from meshpipe.generation.saved import open_saved
from meshpipe.layers.examine import abstract_layers
from meshpipe.weights import WeightsFolder, model_of
from meshpipe.weights.published_model import PublishedModel
from meshpipe.weights.writing import Outline, write_file

RECIPE = f"{Path(__file__).parents[1] / 'published_recipes.py'}:pipeline"
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`half` is llama3 in bfloat16, and `whole` has the same values in float32."""
    assert jax.device_count() == 8  # before a command asks for fewer
    monkeypatch.chdir(tmp_path)
    for name, dtype in {"half": BFLOAT16, "whole": np.dtype(np.float32)}.items():
        shutil.copytree(golden.FOLDER / "llama3", name)
        (tmp_path / name / "model.safetensors").unlink()
        made = {key: value.astype(BFLOAT16).astype(dtype) for key, value in golden.tensors("llama3").items()}
        outlines = [Outline(key, value.shape, dtype) for key, value in made.items()]
        write_file(tmp_path / name / "model.safetensors", outlines, made.__getitem__)
    return tmp_path


def test_parameters_are_kept_in_bfloat16_where_nothing_is_lost(folder: Path) -> None:
    half, whole = WeightsFolder("half"), WeightsFolder("whole")
    assert (half.param_dtype, whole.param_dtype) == ("bfloat16", "float32")
    config = {**half.fields.values, "dtype": "bfloat16"}
    Path("config").mkdir()
    Path("config/config.json").write_text(json.dumps(config))
    assert WeightsFolder("config").param_dtype == "bfloat16"
    assert half.rounded_to("bfloat16") == whole.rounded_to("float32") == ""
    assert whole.rounded_to("bfloat16") == "Its float32 weights are rounded to bfloat16."
    for dtype, kept in (("bfloat16", "bfloat16"), ("float32", "float32")):
        assert getattr(open_saved("half", dtype=dtype).model, "param_dtype", "") == kept
        assert getattr(open_saved("whole", dtype=dtype).model, "param_dtype", "") == "float32"
    assert open_saved("whole", param_dtype="bfloat16").note
    short, found = PublishedModel(dtype="bfloat16"), PublishedModel()
    both = replace(golden.CONFIGS["llama3"], dtype="bfloat16", param_dtype="bfloat16")
    assert short.found("half", None, frozen=True) == both
    assert short.found("half", None) == short.found("whole", None, frozen=True) == replace(both, param_dtype="float32")
    assert found.found("half", None, frozen=True) == golden.CONFIGS["llama3"]


def test_import_in_bfloat16(folder: Path) -> None:
    import_weights("half", "imported", dtype="bfloat16")
    assert model_of("imported") == replace(golden.CONFIGS["llama3"], param_dtype="bfloat16")
    assert PublishedModel().found("imported", None) == model_of("imported")
    expected = golden.leaves("llama3")
    for path, leaf in load("imported").items():
        assert leaf.dtype == BFLOAT16
        np.testing.assert_array_equal(leaf, expected[path].astype(BFLOAT16), err_msg=path)


@pytest.mark.parametrize("name", ["llama3", "gpt2", "gemma3"])
def test_all_parameters_of_all_models(name: str) -> None:
    config = replace(golden.CONFIGS[name], param_dtype="bfloat16")
    layers, before = (abstract_layers(c.layers(), None) for c in (config, golden.CONFIGS[name]))
    for layer, other in zip(layers, before, strict=True):
        assert {leaf.dtype for leaf in layer.params.values()} == {BFLOAT16}
        assert layer.axes == other.axes


@pytest.mark.slow
def test_adapters_are_trained_as_upon_float32(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    losses, kept = {}, {"half": "bfloat16", "whole": "float32"}
    for name in ("half", "whole"):
        flags = f"--init-from {name} --lora.rank 2 --steps 3 --learning-rate 0.01 --checkpoint-dir tuned-{name}"
        flags += f" --model.param-dtype {kept[name]}"
        assert main(["train", RECIPE, *flags.split(), "--metrics", f"{name}.jsonl"]) == 0, capsys.readouterr().err
        lines = [json.loads(line) for line in Path(f"{name}.jsonl").read_text().splitlines()]
        losses[name] = [line["loss"] for line in lines if line["event"] == "step"]
        capsys.readouterr()
    assert losses["half"] == pytest.approx(losses["whole"], abs=1e-5)
    modules, base = load("tuned-half", layers="recipe"), golden.leaves("llama3")
    np.testing.assert_array_equal(modules[0].embedding[...], base["layers/0/embedding"].astype(BFLOAT16))
    assert {leaf.dtype for leaf in load("tuned-half").values()} == {np.dtype(np.float32)}
    resumed = "--init-from half --lora.rank 2 --steps 4 --resume --checkpoint-dir tuned-half"
    assert main(["train", RECIPE, *resumed.split()]) == 0, capsys.readouterr().err
    for name in ("half", "whole"):
        export = f"weights export tuned-{name} --step 3 --to out-{name} --dtype float32".split()
        assert main(export) == 0, capsys.readouterr().err
    found, expected = (WeightsFolder(f"out-{name}") for name in ("half", "whole"))
    wanted = {path: jax.ShapeDtypeStruct(leaf.shape, np.float32, sharding=one()) for path, leaf in base.items()}
    for path, leaf in found.read(wanted).items():
        np.testing.assert_allclose(leaf, expected.read({path: wanted[path]})[path], atol=1e-5, err_msg=path)


def one() -> jax.sharding.Sharding:
    return jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])


@pytest.mark.slow
def test_text_and_what_training_in_bfloat16_says(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for flags in ("half", "whole", "half --param-dtype bfloat16", "whole --param-dtype bfloat16"):
        assert main(f"generate {flags} --prompt fox --max-tokens 6".split()) == 0
        shown = capsys.readouterr()
        texts.append(shown.out)
        assert ("Its float32 weights are rounded to bfloat16." in shown.err) == ("whole --" in flags)
    assert len(set(texts)) == 1
    flags = ["--init-from", "half", "--model.param-dtype", "bfloat16", "--steps", "1"]
    assert main(["train", RECIPE, *flags]) == 0, capsys.readouterr().err
    assert (
        "Trained in bfloat16, where updates below 1/256 of a parameter are lost to rounding: layers/0/embedding"
        in " ".join(capsys.readouterr().out.split())
    )
    import_weights("whole", "imported")
    for flags in ("imported", "imported --param-dtype bfloat16", "imported --mesh.tensor 2 --param-dtype bfloat16"):
        assert main(f"generate {flags} --prompt fox --max-tokens 6".split()) == 0, capsys.readouterr().err
        shown = capsys.readouterr()
        assert shown.out == texts[0]
        assert ("Its float32 weights are rounded to bfloat16." in shown.err) == ("--param" in flags)
    few = "--lora.rank 2 --model.param-dtype bfloat16 --checkpoint-dir"
    assert main(["train", RECIPE, "--init-from", "imported", *few.split(), "tuned", "--steps", "1"]) == 0, (
        capsys.readouterr().err
    )
    assert "Its float32 weights are rounded to bfloat16." in " ".join(capsys.readouterr().out.split())
    assert main(["train", RECIPE, *few.split(), "tuned", "--resume", "--steps", "2"]) == 0, capsys.readouterr().err
    assert main(["generate", "tuned", "--prompt", "fox"]) == 0, capsys.readouterr().err
    assert main(["generate", "tuned", "--prompt", "fox", "--param-dtype", "float32"]) == 2
    assert "The base of adapters is kept as their run kept it" in capsys.readouterr().err
    assert load("tuned", layers="recipe")[0].embedding[...].dtype == BFLOAT16
