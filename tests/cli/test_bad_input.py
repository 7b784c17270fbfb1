"""Wrong calls: one clear message with the way out, exit code 2, no traceback, and nothing written."""

import re
import shutil
from pathlib import Path

import jax
import pytest

from meshpipe.cli import main
from meshpipe.plan.layer_costs import LayerCosts, ModelCosts, Setting

TINY = f"{Path(__file__).parents[1] / 'tiny_recipes.py'}:pipeline"
LANGUAGE = f"{Path(__file__).parents[2] / 'recipes' / 'language_model.py'}:debug"
WRONG = """
from tests.tiny_recipes import *

class Numbers(Points):
    def __getitem__(self, index): return 3

class NoNames(Points):
    def __getitem__(self, index): return {3: np.zeros(8)}

class Endless(Points):
    def __len__(self): return 10**30

@dataclass(frozen=True, kw_only=True)
class WrongData(PointsConfig):
    kind: int = 0
    def train_source(self):
        return [lambda *a: 3, Numbers, NoNames, Endless][self.kind](512, 8)

@dataclass(frozen=True, kw_only=True)
class WrongLayers(DenseConfig):
    def layers(self): return 3

@dataclass(frozen=True, kw_only=True)
class WrongTied(DenseConfig):
    def tied(self): return 3

def layers() -> Config: return replace(pipeline(), model=WrongLayers())
def tied() -> Config: return replace(pipeline(), model=WrongTied())
def source() -> Config: return replace(pipeline(), data=WrongData())
"""
UNNAMED = """
import tyro
from tests.tiny_recipes import *

class Unnamed:
    def __init__(self, source): self.source = source
    def __len__(self): return len(self.source)
    def __getitem__(self, index): return self.source[index]

@dataclass(frozen=True, kw_only=True)
class UnnamedData(PointsConfig):
    def train_source(self): return Unnamed(super().train_source())

@dataclass(frozen=True, kw_only=True)
class ObjectModel(DenseConfig):
    extra: tyro.conf.Suppress[Any] = object()

def data() -> Config: return replace(pipeline(), data=UnnamedData())
def model() -> Config: return replace(pipeline(), model=ObjectModel())
"""
CLASSES = f"{Path(__file__).parents[2] / 'recipes' / 'text_classifier.py'}:pipeline_data"
BROKEN = "def number():\n    return 3\n\ndef fails():\n    raise ValueError('no such layout')\n"

FAILING = """
from dataclasses import dataclass, replace
from meshpipe import Config, named
from tests import tiny_recipes

def lookup(x):
    return {"features": x}["labels"]

@dataclass(frozen=True, kw_only=True)
class Failing(tiny_recipes.DenseConfig):
    def layers(self):
        return [*super().layers(), lookup]

@dataclass(frozen=True, kw_only=True)
class Unbuilt(tiny_recipes.DenseConfig):
    def layers(self):
        return [lambda rngs: 1 / 0] * 4

@dataclass(frozen=True, kw_only=True)
class Unread(tiny_recipes.DenseConfig):
    def layers(self):
        return [named("memory", layer) if i == 1 else layer for i, layer in enumerate(super().layers())]

@dataclass(frozen=True, kw_only=True)
class Early(tiny_recipes.DenseConfig):
    def layers(self):
        return [*super().layers(), lambda x, memory: x + memory, named("memory", lambda x: x), lambda x, memory: x]

@dataclass(frozen=True, kw_only=True)
class Asking(tiny_recipes.DenseConfig):
    def loss(self, output, batch, memory):
        return super().loss(output, batch)

def unread() -> Config:
    return replace(tiny_recipes.pipeline(), model=Unread())

def early() -> Config:
    return replace(tiny_recipes.pipeline(), model=Early())

def asking() -> Config:
    return replace(tiny_recipes.pipeline(), model=Asking())

def fails() -> Config:
    return replace(tiny_recipes.pipeline(), model=Failing())

def unbuilt() -> Config:
    return replace(tiny_recipes.pipeline(), model=Unbuilt())
"""

READ_COSTS = "--partition measured --costs costs.json"
COSTS = ModelCosts((LayerCosts("Dense", 1.0, 2.0, 1.0, 1.0, 0.0, 288, 256),) * 4, Setting(4, 1, 1, "none"), "cpu", 1.0)

CALLS: dict[str, tuple[str | list[str], str]] = {
    # Commands and recipes.
    "no command": (
        "",
        "The command must be one of recipes, init, train, verify, plan, advise, generate, eval, metrics, launch, "
        "checkpoint, data, weights, doctor. Got none.",
    ),
    "unknown command": ("trian TINY", "Did you mean train?"),
    "no recipe": ("train", "The first argument must be a recipe: meshpipe train RECIPE [flags]. Got none."),
    "flag before the recipe": ("train --steps 3 TINY", "The first argument must be a recipe"),
    "recipe without a function": ("train tiny_recipes", "A recipe is FILE.py:FUNCTION, or FILE:FUNCTION."),
    "recipe of a missing file": ("plan nowhere.py:single", "There is no file nowhere.py"),
    "recipe of a missing function": ("verify TINYs", "Did you mean"),
    "recipe that is not a Config": ("train broken.py:number", "Return a Config from number"),
    "recipe that fails": ("train broken.py:fails", "fails on line 5: no such layout"),
    "recipe that is not Python": ("train notes.txt.py:f", "Correct the file."),
    "layer that fails": (
        "train failing.py:fails --checkpoint-dir new/run --compile-cache new/programs",
        "KeyError: 'labels' This comes from layers/4 (lookup, stage 1), calle",
    ),
    "layer that fails in a plan": (
        "plan failing.py:fails",
        "KeyError: 'labels' This comes from layers/4 (lookup, stage",
    ),
    "layer that fails for a folder that is there": (
        "train failing.py:fails --checkpoint-dir folder --compile-cache folder",
        "KeyError: 'labels' This comes from layers/4 (lookup, stage 1), calle",
    ),
    "layer that cannot be made": (
        "verify failing.py:unbuilt",
        "ZeroDivisionError: division by zero This comes from the constructor of layers/0 (<lambda>).",
    ),
    "output that is not read": (
        "train failing.py:unread --checkpoint-dir new/run --compile-cache new/programs",
        "A named output must be read by name. Got 'memory', the output of layers/1 (Dense), which no layer after it",
    ),
    "output that does not exist yet": (
        "plan failing.py:early",
        "A named output must exist before it is read. layers/4 (<lambda>) reads 'memory', the output of layers/5.",
    ),
    "loss that asks for no output": (
        "verify failing.py:asking",
        "the loss may only require named outputs. Got the parameter 'memory'; no output has a name. Name it",
    ),
    # Flags.
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
    # Mesh, batch and microbatches.
    "empty axis": ("train TINY --mesh.pipeline 0", "--mesh.pipeline must be at least 1. Got 0."),
    "more devices than there are": ("train TINY --mesh.tensor 8", "Got 16, with 8 started."),
    "batch that does not divide": ("train TINY --batch-size 10", "The nearest sizes that fit are 8 and 12."),
    "microbatch over data": ("train TINY --mesh.data 3", "must be a multiple of --num-microbatches * --mesh.data"),
    "empty batch": ("train TINY --batch-size 0", "--batch-size must be at least 1. Got 0."),
    "batch larger than the data": ("train TINY --data.count 15", "Pass a smaller --batch-size"),
    "no microbatch": ("train TINY --num-microbatches 0", "--num-microbatches must be at least 1. Got 0."),
    # Stages and schedules.
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
    # Models and data.
    "text that is not there": ("train LANGUAGE --data.path nowhere", "--data.path must name a text file or a folder"),
    "windows longer than the text": ("train LANGUAGE --data.path old.jsonl", "a smaller --data.sequence-length"),
    "attention that these devices lack": ("train LANGUAGE --model.attention cudnn", "--model.attention auto or xla."),
    "heads that do not divide the width": ("train LANGUAGE --model.num-heads 3", "--model.num-heads"),
    "heads that do not divide by tensor": ("plan LANGUAGE --mesh.tensor 4", "Choose a divisor of"),
    # Files.
    "metrics in a missing folder": ("train TINY --metrics missing/m.jsonl", "Create it, or name another file."),
    "compiled programs into a file": (
        "train TINY --compile-cache old.jsonl",
        "--compile-cache must be a writable folder",
    ),
    "verify with programs in a file": (
        "verify TINY --compile-cache old.jsonl",
        "--compile-cache must be a writable folder",
    ),
    **{
        f"{flag} of a name that is too long": (f"{command} TINY {flag} LONG{suffix}", "File name too long")
        for command, flag, suffix in (
            ("train", "--checkpoint-dir", ""),
            ("train", "--metrics", ".jsonl"),
            ("train", "--trace", ".json"),
            ("train", "--compile-cache", ""),
            ("plan", "--plot", ".png"),
            ("plan", "--save-schedule", ".txt"),
            ("plan", "--profile --save-costs", ".json"),
        )
    },
    **{
        f"{flag} without a name": (["train", "TINY", *more.split(), flag, ""], f"{flag} must name a file or folder.")
        for flag, more in (
            ("--checkpoint-dir", ""),
            ("--metrics", ""),
            ("--trace", ""),
            ("--compile-cache", ""),
            ("--costs", "--schedule auto"),
        )
    },
    "text without a name": (["train", "LANGUAGE", "--data.path", ""], "--data.path must name a file or folder."),
    "home of nobody": ("train TINY --metrics ~nobody-of-that-name/m.jsonl", "there is no ~nobody-of-that-name"),
    "trace where nothing can be made": ("train TINY --trace /proc/t.json", "--trace must name a writable file"),
    "plot where nothing can be made": ("plan TINY --plot /proc/t.png", "--plot must name a writable file"),
    "checkpoints where nothing can be made": (
        "train TINY --checkpoint-dir /proc/t/u",
        "writable folder. Got '/proc",
    ),
    "costs of deep nesting": ("plan TINY --schedule auto --costs deep.json", "must name a JSON file of layer costs"),
    "costs that are not finite": ("plan TINY --schedule auto --costs infinite.json", "forward is inf"),
    "costs without end": ("plan TINY --schedule auto --costs /dev/zero", "bytes"),
    "data without a name": ("train unnamed.py:data --checkpoint-dir new", "Give Unnamed a __repr__"),
    "model with an object without a name": ("train unnamed.py:model --checkpoint-dir new", "for extra of the model"),
    # Recipes of the wrong types.
    "layers that are a number": ("plan wrong.py:layers", "layers() of a model must return a list. Got 3, a int."),
    "tied that is a number": ("plan wrong.py:tied", "tied() of a model must return a list. Got 3, a int."),
    "data that is a number": (
        "train wrong.py:source --data.kind 0",
        "A data source must have __len__ and __getitem__.",
    ),
    "examples that are numbers": ("train wrong.py:source --data.kind 1", "An example must be a dict of arrays by the"),
    "fields without names": ("train wrong.py:source --data.kind 2", "An example must be a dict of arrays by the names"),
    "data of endless length": ("train wrong.py:source --data.kind 3", "A data source must have a length. len() of"),
    # Impossible sizes.
    "mesh of very many devices": ("plan TINY --mesh.pipeline 100000000", "at most 4096 virtual CPU devices"),
    "very wide layers": (
        "train TINY --model.width 1000000000000",
        "A run must fit into the memory of this machine, which its 2 virtual CPU devices share.",
    ),
    "very many microbatches": (
        "plan TINY --num-microbatches 1000000000 --batch-size 1000000000",
        "--num-microbatches must be at least 1 and below 65537",
    ),
    "very many steps": ("train TINY --steps 100000000000000000000", "--steps must be at least 0 and below 2147483648"),
    "very long warm-up": ("train TINY --warmup-steps 10000000000", "--warmup-steps must be at least 0 and below"),
    "very many updates to verify": ("verify TINY --updates 1000000000", "--updates must be at least 1 and below"),
    "very many processes": ("launch --processes 100000000 -- train TINY", "--processes must be at least 1 and below"),
    "no device per process": (
        "launch --processes 2 --devices-per-process 0 -- train TINY",
        "--devices-per-process must be at least 1. Got 0.",
    ),
    "launch of no recipe": ("launch --processes 2 -- train --steps 3", "A recipe comes after train"),
    "fewer tokens than the data has": (
        "train LANGUAGE --model.vocab-size 100",
        "Every value of inputs must be below 100",
    ),
    "fewer classes than the data has": ("train CLASSES --model.num-classes 3", "Every value of labels must be below 3"),
    "checkpoint folder of a long name": ("checkpoint show LONG", "File name too long"),
    "recipe of a long name": ("train LONG.py:f", "There is no file"),
    "metrics into a folder": ("train TINY --metrics folder", "Name a file in it."),
    "metrics over another run": ("train TINY --metrics old.jsonl", "Name another file, remove it"),
    "picture without a format": ("plan TINY --plot picture", "--plot must name a file whose suffix is one of"),
    "picture in a missing folder": ("plan TINY --plot missing/a.png", "a folder that exists"),
    "resume without a folder": ("train TINY --resume", "add --checkpoint-dir DIR"),
    "saving without a folder": ("train TINY --checkpoint-every 2", "add --checkpoint-dir DIR"),
    "resume from nothing": (
        "train TINY --resume-from 2 --checkpoint-dir folder",
        "or leave --resume-from out to start a new one",
    ),
    "resume from without a folder": ("train TINY --resume-from 3", "add --checkpoint-dir DIR"),
    "automatic resume without a folder": ("train TINY --auto-resume", "add --checkpoint-dir DIR"),
    "resume from two steps": ("train TINY --resume-from 2 --resume --checkpoint-dir saved", "Leave one of them out"),
    "resume of nothing": ("train TINY --resume --checkpoint-dir folder", "or leave --resume out to start a new one"),
    "resume of a missing folder": ("train TINY --resume --checkpoint-dir missing", "or leave --resume out"),
    "checkpoints into a file": ("train TINY --checkpoint-dir old.jsonl", "Name another folder."),
    "checkpoints below a file": ("train TINY --checkpoint-dir old.jsonl/deep", "Name another folder."),
    "learning rate that is no number": ("train TINY --learning-rate nan", "--learning-rate must be a number"),
    "decay rate of 1": ("train TINY --beta1 1", "--beta1 must be a number of at least 0 and below 1. Got 1.0."),
    "decay rate above 1": ("train TINY --beta2 2", "--beta2 must be a number of at least 0 and below 1. Got 2.0."),
    "time-out that is no number": ("train TINY --step-timeout nan", "--step-timeout must be a number of at least 0"),
    "seed that JAX would cut": ("train TINY --seed 4294967296", "below 4294967296. Got 4294967296."),
    "huge mesh": ("train TINY --mesh.pipeline 100000000", "at most 4096 virtual CPU devices. Got 100,000,000."),
    "huge mesh to plan": ("plan TINY --mesh.pipeline 100000000", "at most 4096 virtual CPU devices. Got 100,000,000."),
    "clipping at no number": ("train TINY --clip-norm nan", "--clip-norm must be above 0"),
    "negative number of checkpoints": ("train TINY --checkpoint-dir new --checkpoint-keep -1", "must be at least 0"),
    "no update to verify": ("verify TINY --updates 0", "--updates must be at least 1. Got 0."),
}

# With a folder `saved`, in which a run of four steps has saved steps 2 and 4.
CALLS_WITH_CHECKPOINTS = {
    "new run in the folder of another": ("train TINY --checkpoint-dir saved", "Pass --resume to continue"),
    "another seed": ("train TINY --seed 1 RESUME", "Got 1, and saved was saved with 0. Pass --seed 0"),
    "another batch size": ("train TINY --batch-size 32 RESUME", "Pass --batch-size 16"),
    "another model": ("train TINY --model.depth 3 RESUME", "Got depth 3, and saved was saved with 4."),
    "another optimizer": (
        "train TINY --optimizer sgd RESUME",
        "Got optimizer 'sgd', and saved was saved with 'adamw'.",
    ),
    "other data": ("train TINY --data.count 100 RESUME", "or start a new run"),
    "resume from a step that is not there": (
        "train TINY --resume-from 3 --checkpoint-dir saved",
        "Got 3. Complete steps there: 2, 4.",
    ),
    "no such step": ("checkpoint show saved --step 3", "Complete steps there: 2, 4."),
    "no such step to verify": ("checkpoint verify saved --step 3", "Complete steps there: 2, 4."),
    "step that is no number": ("checkpoint show saved --step last", "--step"),
    "no folder to list": ("checkpoint list missing", "Name the folder that a run saves to."),
    "folder without checkpoints": ("checkpoint list folder", "Name the folder that a run saves to."),
    "no folder named": ("checkpoint list", "Missing"),
    "unknown checkpoint command": ("checkpoint lst saved", "Did you mean list?"),
    "no checkpoint command": ("checkpoint", "The command must be one of list, show, verify. Got none."),
}


@pytest.fixture(scope="module", autouse=True)
def started() -> None:
    """Starts JAX with the devices of the tests, before a command requests others."""
    assert jax.device_count() == 8


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr("meshpipe.stage.compile_stages.compile_stage", must_not_compile)
    monkeypatch.setattr("meshpipe.choose.profile.compile_stage", must_not_compile)
    (tmp_path / "folder").mkdir()
    (tmp_path / "old.jsonl").write_text('{"event": "end"}\n')
    COSTS.save(tmp_path / "costs.json")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    (tmp_path / "infinite.json").write_text(
        (tmp_path / "costs.json").read_text().replace('"forward": 1.0', '"forward": 1e999')
    )
    (tmp_path / "wrong.py").write_text(WRONG)
    (tmp_path / "unnamed.py").write_text(UNNAMED)
    (tmp_path / "broken.py").write_text(BROKEN)
    (tmp_path / "failing.py").write_text(FAILING)
    (tmp_path / "notes.txt.py").write_text("dear diary\n")
    return tmp_path


def must_not_compile(*arguments: object, **keywords: object) -> None:
    raise AssertionError("refused only after compiling")


def contents(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
        if "__pycache__" not in path.parts
    }


def split(arguments: str | list[str]) -> list[str]:
    names = {"TINY": TINY, "LANGUAGE": LANGUAGE, "CLASSES": CLASSES, "COSTS": READ_COSTS, "LONG": 300 * "n"}
    words = arguments.split() if isinstance(arguments, str) else arguments
    for name, meaning in names.items():
        words = [word.replace(name, meaning) for word in words]
    return [part for word in words for part in (word.split() or [word])]


def refuse(arguments: str | list[str], phrase: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Runs a command that must end with code 2, the phrase on standard error, and no change of the folder."""
    before = contents(folder)
    code = main(split(arguments))
    error = re.sub(r"[│╭╮╰╯─\s]+", " ", capsys.readouterr().err)
    assert code == 2, error
    assert phrase in error
    assert "Traceback" not in error
    assert contents(folder) == before


@pytest.mark.parametrize(("arguments", "phrase"), CALLS.values(), ids=CALLS)
def test_wrong_calls(arguments: str | list[str], phrase: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refuse(arguments, phrase, folder, capsys)


@pytest.fixture(scope="module")
def run_of_four_steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "saved"
    flags = f"train {TINY} --steps 4 --eval-batches 0 --checkpoint-every 2 --checkpoint-dir {folder}"
    assert main(flags.split()) == 0
    return folder


@pytest.fixture
def saved(run_of_four_steps: Path, folder: Path) -> Path:
    return Path(shutil.copytree(run_of_four_steps, folder / "saved"))


@pytest.mark.parametrize(("arguments", "phrase"), CALLS_WITH_CHECKPOINTS.values(), ids=CALLS_WITH_CHECKPOINTS)
def test_wrong_calls_with_checkpoints(
    arguments: str, phrase: str, saved: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refuse(arguments.replace("RESUME", "--resume --checkpoint-dir saved"), phrase, folder, capsys)


def damage(step: Path, item: str) -> None:
    """Flips one bit in the middle of the largest file of an item."""
    file = max((path for path in (step / item).rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("item", ["stage_0", "stage_1", "meta"])
def test_a_damaged_checkpoint_is_not_resumed(
    item: str, saved: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(saved / "4", item)
    resume = "train TINY --steps 9 --metrics new.jsonl --resume --checkpoint-dir saved"
    refuse(resume, "Pass --resume-from 2, the newest intact step.", folder, capsys)
    assert main(["checkpoint", "verify", "saved"]) == 1
    assert "step 2: every byte is good" in capsys.readouterr().out
    assert main(["checkpoint", "verify", "saved", "--step", "2"]) == 0


def test_a_checkpoint_with_a_missing_file_is_not_resumed(
    saved: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    max(
        (path for path in (saved / "4" / "stage_1").rglob("*") if path.is_file()), key=lambda p: p.stat().st_size
    ).unlink()
    refuse("train TINY --steps 9 --resume --checkpoint-dir saved", "Pass --resume-from 2", folder, capsys)
