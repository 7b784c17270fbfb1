"""`--init-from` takes a folder of published weights; adapters and what they leave out come from it again."""

import shutil
from pathlib import Path

import golden
import jax
import numpy as np
import pytest

from meshpipe import load
from meshpipe.cli import main

RECIPE = str(Path(__file__).parent / "published_recipes.py")
FEW = "--steps 1 --batch-size 4 --eval-batches 0 --learning-rate 0.01"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    assert jax.device_count() == 8  # before a command asks for fewer
    monkeypatch.chdir(tmp_path)
    shutil.copytree(golden.FOLDER / "llama3", tmp_path / "weights")
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog.\n" * 100)
    return tmp_path


def run(layout: str, flags: str) -> int:
    return main(["train", f"{RECIPE}:{layout}", *f"{FEW} {flags}".split()])


@pytest.mark.parametrize("layout", ["single", pytest.param("pipeline", marks=pytest.mark.slow)])
def test_a_run_begins_with_the_published_weights(layout: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = "--model.rope-theta 20000" if layout == "single" else ""
    assert run(layout, f"--init-from weights --steps 0 --checkpoint-dir tuned {other}") == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "Started with the weights of weights." in shown
    differs = "The model differs from its config.json: rope_theta is 20000.0, not 500000.0."
    assert (differs in shown) == bool(other)
    found, expected = load("tuned"), golden.leaves("llama3")
    assert found.keys() == expected.keys()
    for path, leaf in found.items():
        np.testing.assert_array_equal(leaf, expected[path], err_msg=path)


@pytest.mark.slow
def test_adapters_leave_out_the_published_base_and_find_it_again(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapt = "--lora.rank 2 --checkpoint-dir tuned"
    assert run("single", f"{adapt} --init-from weights") == 0
    assert all("lora" in path for path in load("tuned"))
    modules = load("tuned", layers="recipe")
    np.testing.assert_array_equal(modules[0].embedding[...], golden.leaves("llama3")["layers/0/embedding"])
    assert run("single", f"{adapt} --resume --steps 2") == 0
    assert f"Its base is {folder / 'weights'}." in capsys.readouterr().out
    (folder / "weights").rename(folder / "moved")
    assert run("single", f"{adapt} --resume --steps 3") == 2
    assert "Pass the folder that does as --init-from." in capsys.readouterr().err
    assert run("single", f"{adapt} --resume --steps 3 --init-from moved") == 0


@pytest.fixture
def adapters(folder: Path) -> Path:
    """A folder as PEFT writes it, upon the weights."""
    assert run("single", "--lora.rank 2 --lora.targets query down --checkpoint-dir before --init-from weights") == 0
    assert main(["weights", "export", "before", "--to", "adapters", "--adapters"]) == 0
    return folder / "adapters"


@pytest.mark.slow
def test_a_run_goes_on_with_adapters_of_peft(adapters: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = "--lora.rank 2 --lora.targets query down --init-from adapters --checkpoint-dir"
    assert run("single", f"{asked} after --steps 0") == 0
    assert f"Started with the weights of {adapters} upon {adapters.with_name('weights')}." in capsys.readouterr().out
    before, after = load("before"), load("after")
    assert before.keys() == after.keys()
    for path, leaf in before.items():
        np.testing.assert_array_equal(after[path], leaf, err_msg=path)
    assert run("single", "--lora.rank 2 --lora.targets query down --lora.alpha 4 --init-from before --steps 0") == 0
    assert "Its adapters had the scale 8, and have 2 here, as at layers/1/" in capsys.readouterr().out
    adapters.with_name("weights").rename("moved")
    assert run("single", f"{asked} other") == 2
    assert "Pass that folder as --init-base." in capsys.readouterr().err
    assert run("single", f"{asked} other --init-base moved --steps 0") == 0
    assert run("single", "--init-from adapters --init-base moved") == 2
    assert (
        "They need --lora.rank 2, --lora.alpha 16, --lora.targets attention/query swiglu/down."
        in capsys.readouterr().err
    )
    for command in (
        "generate adapters --base moved --prompt a --max-tokens 4",
        "generate after --base moved --prompt a",
    ):
        assert main([*command.split(), "--max-tokens", "4"]) == 0, capsys.readouterr().err
    first, second = capsys.readouterr().out.splitlines()
    assert first == second
    assert main(["eval", "adapters", "--base", "moved", "--data", "text.txt", "--json"]) == 2
    assert "whose tokens are not bytes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--init-from weights --init-base weights", "--init-base is for adapters."),
        ("--init-from weights --init-step 3", "--init-step is for checkpoints of a run."),
        ("--init-from weights --init-what all", "--init-what is for checkpoints of a run."),
        ("--init-from weights --model.d-model 32", "and the model's [288, 32]"),
        ("--init-from weights --model.num-blocks 1", "the model has no use for model.layers.1."),
        ("--init-from weights --model.num-blocks 3", "has no layers/3/attention/key/kernel"),
        ("--init-from weights --model.qkv-bias", "has no layers/1/attention/key/bias"),
    ],
)
def test_weights_of_another_model(folder: Path, flags: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("single", f"{flags} --checkpoint-dir new") == 2
    assert message in capsys.readouterr().err
    assert not (folder / "new").exists()
