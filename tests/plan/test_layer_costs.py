"""Costs of layers as plain data: sums over stages, files, and what is refused."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from meshpipe.plan.layer_costs import LayerCosts, ModelCosts, Setting
from meshpipe.plan.plan import Op

SETTING = Setting(microbatch_size=4, data=2, tensor=1, remat="none")
LAYERS = (
    LayerCosts("Embed", 1.0, 2.0, 0.5, 1.5, transfer=0.25, parameter_bytes=8, activation_bytes=16),
    LayerCosts("Block", 2.0, 4.0, 2.0, 2.5, transfer=0.5, parameter_bytes=8, activation_bytes=16),
    LayerCosts("Head", 3.0, 5.0, 3.0, 2.5, transfer=0.0, parameter_bytes=8, activation_bytes=16),
)
COSTS = ModelCosts(LAYERS, SETTING, "cpu", 1.5)
KINDS = ["Embed", "Block", "Head"]


def test_stages_take_as_long_as_their_layers() -> None:
    costs = COSTS.of_stages([range(2), range(2, 3)])
    assert [costs.time(0, op) for op in Op] == [3.0, 6.0, 2.5, 4.0]
    assert [costs.time(1, op) for op in Op] == [3.0, 5.0, 3.0, 2.5]
    assert costs.transfer == 0.5
    assert COSTS.of_stages([range(3)]).transfer == 0.0


def test_a_file_has_them_all(tmp_path: Path) -> None:
    file = tmp_path / "costs.json"
    COSTS.save(file)
    assert ModelCosts.load(str(file)) == replace(COSTS, file=str(file))
    assert COSTS.describe() == "costs measured on cpu in 1.5 s"
    assert ModelCosts.load(str(file)).describe() == f"costs of {file}, measured on cpu"


@pytest.mark.parametrize(
    ("kinds", "setting", "phrase"),
    [
        (["Embed", "Head"], SETTING, "Got 3 layers in measuring, and the model has 2."),
        (["Embed", "Block", "Block"], SETTING, "Got Head for layer 2 in measuring, and the model has Block."),
        (KINDS, replace(SETTING, data=1), "Got data 2 in measuring, and 1 here."),
        (KINDS, replace(SETTING, remat="full"), "Got remat none in measuring, and full here."),
    ],
)
def test_costs_of_something_else(kinds: list[str], setting: Setting, phrase: str) -> None:
    COSTS.check(KINDS, SETTING)
    with pytest.raises(ValueError, match=re.escape(phrase)):
        COSTS.check(kinds, setting)


@pytest.mark.parametrize(
    ("text", "phrase"),
    [
        ("not json", "must name a JSON file of layer costs"),
        ("[]", "must name a JSON file of layer costs"),
        ("{}", "there is no 'layers'"),
        (json.dumps({"layers": [{"kind": 3}]}), "kind is 3"),
        (json.dumps({"layers": [{"kind": "Embed", "forward": -1}]}), "forward is -1"),
        (json.dumps({"layers": [{"kind": "Embed", "forward": "1"}]}), "forward is '1'"),
    ],
)
def test_files_that_hold_none(tmp_path: Path, text: str, phrase: str) -> None:
    file = tmp_path / "costs.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=re.escape(phrase)) as error:
        ModelCosts.load(str(file))
    assert str(file) in str(error.value)


def test_times_that_are_not_finite(tmp_path: Path) -> None:
    file = tmp_path / "costs.json"
    replace(COSTS, layers=(replace(LAYERS[0], forward=float("inf")), *LAYERS[1:])).save(file)
    with pytest.raises(ValueError, match="finite"):
        ModelCosts.load(str(file))
