"""Wrong flags: refused with one clear message, before anything is compiled or written."""

from pathlib import Path

import pytest

from tests.cli.refused import Call, prepared, refuse

CALLS: dict[str, Call] = {
    "unknown flag": (
        "train TINY --stepz 3",
        "no flag --stepz for train with this recipe. Did you mean --steps?",
    ),
    "flag without a value": ("train TINY --steps", "Missing value for argument '--steps'"),
    "flag that is no number": ("train TINY --steps many", "--steps INT"),
    "negative steps": ("train TINY --steps -1", "--steps must be at least 0. Got -1."),
    "negative seed": ("train TINY --seed -1", "--seed must be at least 0. Got -1."),
    "negative evaluation interval": ("train TINY --eval-every -5", "--eval-every must be at least 0. Got -5."),
    "negative learning rate": ("train TINY --learning-rate -1", "must be a number of at least 0"),
    "flag of another command": ("train TINY --plot a.png", "There is no flag --plot for train with this recipe."),
    "more stages than layers": ("train TINY --mesh.pipeline 8", "Use fewer pipeline ranks"),
    "too many first layers": ("train TINY --partition 0,1,2,3", "Give 1 after 0, or cut by --partition even."),
    "first layer beyond the layers": ("train TINY --partition 9", "must ascend strictly between 1 and 3, the last"),
    "partition that is no number": (
        "train TINY --partition two",
        "--partition must be one of even, cost, measured, or",
    ),
    "more stages than layers to balance": ("plan TINY --mesh.pipeline 8 --partition cost", "Every stage needs a layer"),
    "more stages than layers for auto": ("train TINY --mesh.pipeline 8 --schedule auto", "Every stage needs a layer"),
    "auto with a wrong number of stages": ("train TINY --schedule auto --partition 0,1,2", "Give 1 after 0"),
    "measuring for no backward": ("train TINY --schedule inference --partition measured", "which has none. Choose"),
    "limit that is no amount": ("train TINY --schedule auto --memory-limit 3XB", "A memory limit must be a number"),
    "limit that nothing keeps to": ("train TINY --memory-limit 3GB", "or pass one of the two."),
    "limit below the least": ("plan TINY --schedule auto --costs costs.json --memory-limit 900B", "fullest rank. Got"),
    "costs that nothing reads": ("train TINY --costs costs.json", "--costs is for --partition measured and --schedule"),
    "costs that are not there": ("train TINY --schedule auto --costs none.json", "must name a readable file"),
    "costs that are none": ("train TINY --schedule auto --costs old.jsonl", "a JSON file of layer costs"),
    "costs of another model": ("plan TINY --model.depth 5 COSTS", "Got 4 layers in costs.json, and the model has 5."),
    "costs of other microbatches": (
        "train TINY --batch-size 32 COSTS",
        "Got microbatch size 4 in costs.json, and 8 he",
    ),
    "costs read and measured": ("plan TINY --profile COSTS", "Leave one of them out."),
    "costs saved unmeasured": (
        "plan TINY --save-costs new.json",
        "--save-costs needs --profile, whose costs it saves.",
    ),
    "costs into a missing folder": ("plan TINY --profile --save-costs missing/new.json", "a folder that exists"),
    "unknown schedule": ("train TINY --schedule 1f1", "Did you mean 1f1b?"),
    "schedule of one stage per rank": ("train TINY --stages-per-rank 2", "a schedule that takes several: gpipe"),
    "no stage per rank": ("train TINY --stages-per-rank 0", "--stages-per-rank must be at least 1. Got 0."),
    "unknown rematerialisation": ("train TINY --remat some", "--remat must be one of none, layer, full, everything"),
    "rematerialisation of too many stages": ("train TINY --remat none,full,none", "Got 3 names (none,full,none) for 2"),
    "rematerialisation of layers that are not there": ("plan TINY --remat layers/9=full", "layers/0 to layers/3"),
    "rematerialisation of layers by no policy": ("train TINY --remat Dense=some", "--remat must be LAYERS=POLICY"),
    "rematerialisation to choose for no limit": ("train TINY --remat auto", "Add e.g. --memory-limit 12GiB."),
    "memory limit that is no size": ("train TINY --remat auto --memory-limit 3apples", "Got '3apples'."),
    "memory limit that nothing fits into": ("train TINY --remat auto --memory-limit 1kB", "Raise it to that, or use"),
    "learning rate that is no number": ("train TINY --learning-rate nan", "--learning-rate must be a number"),
    "decay rate of 1": ("train TINY --beta1 1", "--beta1 must be a number of at least 0 and below 1. Got 1.0."),
    "decay rate above 1": ("train TINY --beta2 2", "--beta2 must be a number of at least 0 and below 1. Got 2.0."),
    "time-out that is no number": ("train TINY --step-timeout nan", "--step-timeout must be a number of at least 0"),
    "seed that JAX would cut": ("train TINY --seed 4294967296", "below 4294967296. Got 4294967296."),
    "clipping at no number": ("train TINY --clip-norm nan", "--clip-norm must be above 0"),
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return prepared(tmp_path, monkeypatch)


@pytest.mark.parametrize(("arguments", "phrase"), CALLS.values(), ids=CALLS)
def test_wrong_flags(arguments: str | list[str], phrase: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refuse(arguments, phrase, folder, capsys)
