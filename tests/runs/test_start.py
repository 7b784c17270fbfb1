"""Where a run starts: a checkpoint is read once, before anything is compiled, to where training goes on with it."""

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest

from meshpipe.checkpoint import Checkpointer, checksums, files
from meshpipe.checkpoint.names import leaf_of
from meshpipe.cli import main
from meshpipe.runs import start
from meshpipe.training import setup

TINY = f"train {Path(__file__).parents[1] / 'tiny_recipes.py'}:pipeline --eval-batches 0 --steps 6"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    assert jax.device_count() == 8
    folder = tmp_path_factory.mktemp("trained")
    assert main(f"{TINY} --steps 4 --checkpoint-every 2 --checkpoint-dir {folder / 'run'}".split()) == 0
    return folder / "run"


@pytest.fixture
def run(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of a folder with steps 2 and 4."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Counter[Path]:
    """How often each file is read whose checksum is known."""
    counted: Counter[Path] = Counter()

    def spy(path: Path, *rest: Any) -> None:
        counted[path.relative_to(Path.cwd())] += 1
        files.read_checked(path, *rest)

    monkeypatch.setattr(checksums, "read_checked", spy)
    return counted


@pytest.fixture
def no_compilation(monkeypatch: pytest.MonkeyPatch) -> None:
    def must_not_compile(*arguments: Any, **keywords: Any) -> None:
        raise AssertionError("refused only after compiling")

    monkeypatch.setattr("meshpipe.stage.compile_stages.compile_stage", must_not_compile)
    monkeypatch.setattr(setup, "initialise", must_not_compile)


def files_of_leaves(step: Path) -> list[Path]:
    """Those of all leaves but the optimizer's counts, which every stage has and reads for itself."""
    names = (path.relative_to(step).as_posix() for path in step.rglob("*") if path.is_file())
    leaves = (Path("run") / step.name / name for name in names if leaf_of(name))
    return sorted(path for path in leaves if not path.parent.name.endswith(".count"))


@pytest.mark.parametrize("layout", ["", "--mesh.pipeline 1 --mesh.data 2"])
def test_a_resume_reads_every_file_once_and_makes_no_first_values(
    layout: str, run: Path, read: Counter[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_first_values(*arguments: Any) -> None:
        raise AssertionError("made first values")

    monkeypatch.setattr(setup, "initialise", no_first_values)
    whole = files_of_leaves(run / "4")
    assert main(f"{TINY} --resume --checkpoint-dir run {layout}".split()) == 0
    assert {path: read[path] for path in whole} == dict.fromkeys(whole, 1)
    assert not any(path.is_relative_to("run/2") for path in read)


def test_weights_alone_are_read_where_only_they_are_wanted(run: Path, read: Counter[Path]) -> None:
    for name in files_of_leaves(run / "4"):
        if ".mu." in name.as_posix():  # damage in what nobody reads does no harm
            name.write_bytes(bytes(len(name.read_bytes())))
    assert main(f"{TINY} --steps 0 --init-from run".split()) == 0
    leaves = Counter(leaf_of(path.relative_to("run/4").as_posix()) for path in read)
    assert {leaf.partition("/")[0] for leaf in leaves if leaf} == {"params", "state"} & {
        key.partition("/")[0] for key in Checkpointer(run).leaves(4)
    }


@pytest.mark.usefixtures("no_compilation")
@pytest.mark.parametrize("how", ["--resume --checkpoint-dir run", "--init-from run --checkpoint-dir new"])
def test_damage_is_found_before_anything_is_compiled(how: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damaged = max(files_of_leaves(run / "4"), key=lambda path: ("params" in path.as_posix(), path.stat().st_size))
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    assert main(f"{TINY} {how}".split()) == 2
    error = capsys.readouterr().err
    flag = "--resume-from" if "resume" in how else "--init-step"
    assert "has changed bytes (leaf params/" in error
    assert f"Pass {flag} 2, the newest intact step." in error
    assert not Path("new").exists()
    assert not (run / "writer.lock").exists()


def test_a_finished_run_is_checked_too(run: Path, capsys: pytest.CaptureFixture[str], read: Counter[Path]) -> None:
    resume = f"{TINY} --steps 4 --resume --checkpoint-dir run"
    assert main(resume.split()) == 0
    assert "Nothing left to do" in capsys.readouterr().out
    whole = files_of_leaves(run / "4")
    assert {path: read[path] for path in whole} == dict.fromkeys(whole, 1)
    whole[-1].write_bytes(bytes(whole[-1].stat().st_size))
    assert main(resume.split()) == 2
    assert "Pass --resume-from 2, the newest intact step." in capsys.readouterr().err


def test_no_values_are_held_twice(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is read is what the trainer trains with, and nothing else is there while it is compiled."""
    original: Callable[..., Any] = start.Start.read
    before: list[int] = []
    held: list[int] = []

    def spy(self: start.Start, shapes: Any) -> Any:
        before.append(sum(array.nbytes for array in jax.live_arrays()))
        found = original(self, shapes)
        sizes = (leaf.nbytes for tree in found.trees for part in tree.values() for leaf in part.values())
        held.append(sum(sizes))
        return found

    def compiling(*arguments: Any, **keywords: Any) -> None:
        held.append(sum(array.nbytes for array in jax.live_arrays()) - before[0])
        raise KeyboardInterrupt

    monkeypatch.setattr(start.Start, "read", spy)
    monkeypatch.setattr(setup, "Optimizer", compiling)
    assert main(f"{TINY} --resume --checkpoint-dir run".split()) == 130
    read, live = held
    assert read > 3 * 288 * 4  # parameters and two moments
    assert live <= read + 1000
