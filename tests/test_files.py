"""Paths given by a caller."""

import errno
import os
import select
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from meshpipe import PipelineConfig
from meshpipe.checkpoint import CheckpointConfig, Checkpointer
from meshpipe.cli import main
from meshpipe.compiler.cache import CompileCache
from meshpipe.config import Config
from meshpipe.data import TextFilesConfig
from meshpipe.errors import ArgumentError
from meshpipe.files import check_file, check_folder, expand, writing_whole
from meshpipe.observe.config import ObserveConfig
from tests import tiny_recipes

TINY = f"{Path(__file__).parent / 'tiny_recipes.py'}:pipeline"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder, and a different current folder in which nothing may be created."""
    (tmp_path / "home").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "home"


def test_every_path_of_a_config_is_expanded(home: Path) -> None:
    config = Config(
        model=tiny_recipes.DenseConfig(),
        data=tiny_recipes.PointsConfig(),
        compile_cache="~/c",
        metrics="~/m",
        trace="~/t.json",
        run_dir="~/r",
        observe=ObserveConfig(track=("tensorboard",), track_dir="~/b", profile_steps="1:2", profile_dir="~/p"),
        checkpoint=CheckpointConfig(checkpoint_dir="~/k"),
        pipeline=PipelineConfig(schedule="~/s.txt", partition="measured", costs="~/l.json"),
    )
    found = [config.compile_cache, config.metrics, config.trace, config.checkpoint.checkpoint_dir]
    found += [config.run_dir, config.observe.track_dir, config.observe.profile_dir]
    found += [config.pipeline.schedule, config.pipeline.costs, TextFilesConfig(path="~/d").path]
    assert found == [str(home / name) for name in ("c", "m", "t.json", "k", "r", "b", "p", "s.txt", "l.json", "d")]
    assert Checkpointer("~/k").directory == home / "k"
    CompileCache("~/c")
    assert (home / "c").is_dir()


def test_every_text_of_a_config_that_names_a_path_is_one_of_those() -> None:
    """A new field that holds a path must be expanded too."""
    named = {
        field.name
        for config in (Config, CheckpointConfig, ObserveConfig, PipelineConfig)
        for field in fields(config)
        if field.type == (str | None) or field.type is str
        if field.name.endswith(("_dir", "_cache", "_file", "_from")) or field.name in ("metrics", "trace", "costs")
    }
    assert named <= {
        "compile_cache",
        "metrics",
        "trace",
        "costs",
        "checkpoint_dir",
        "init_from",
        "run_dir",
        "track_dir",
        "profile_dir",
    }


def test_files_of_plan_and_folders_of_checkpoint_are_expanded(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", TINY, "--save-schedule", "~/mine.txt"]) == 0
    assert main(["plan", TINY, "--schedule", "~/mine.txt"]) == 0
    assert (home / "mine.txt").is_file()
    assert main(["checkpoint", "list", "~/none"]) == 2
    assert str(home / "none") in capsys.readouterr().err
    assert os.listdir() == []


@pytest.mark.parametrize("path", ["", " ", "~nobody-of-that-name/x", "a\0b"])
def test_an_invalid_name_is_refused(path: str) -> None:
    with pytest.raises(ArgumentError, match="`trace` "):
        expand("trace", path)


@pytest.mark.parametrize("path", ["~nobody-of-that-name/x", "x" * 300, "a\0b"])
def test_no_command_fails_deep_inside_for_an_invalid_name(
    path: str, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = ("--tokenizer", "t", "--to", "to", "--sequence-length", "8")
    for call in (
        ("generate", path, "--prompt", "a"),
        ("eval", path),
        ("eval", "x", "--data", path),
        ("metrics", path),
        ("data", "show", path),
        ("data", "prepare", path, *tokenizer),
        ("weights", "import", path, "--to", "to"),
        ("weights", "export", "x", "--to", path),
        ("checkpoint", "list", path),
        ("plan", f"{path}.py:f"),
        ("plan", TINY, "--target", f"{path}.json:8"),
    ):
        assert main(call) == 2, call
        assert capsys.readouterr().err, call
    assert not list(Path.cwd().iterdir())


def test_a_check_does_not_end_the_reader_of_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    check_file("metrics", tmp_path / "pipe")
    poller = select.poll()
    poller.register(reader)
    assert poller.poll(0) == []  # it would hear that its writer is gone
    os.close(reader)


def test_checks_change_nothing_on_disk(tmp_path: Path) -> None:
    (tmp_path / "old").write_text("kept")
    os.mkfifo(tmp_path / "pipe")
    before = os.stat(tmp_path / "old")
    for name in ("new", "old", "pipe"):
        check_file("metrics", tmp_path / name)
    check_folder("checkpoint_dir", tmp_path / "new" / "deeper")
    assert sorted(os.listdir(tmp_path)) == ["old", "pipe"]
    assert os.stat(tmp_path / "old").st_mtime_ns == before.st_mtime_ns


@pytest.mark.parametrize(
    ("check", "name", "message"),
    [
        (check_file, "folder", "must name a file. Got the folder"),
        (check_file, "file/below", "there is no folder|Not a directory"),
        (check_file, "missing/new", "there is no folder"),
        (check_file, "n" * 300, "File name too long"),
        (check_file, "circle", "Too many levels of symbolic links"),
        (check_folder, "file/below", "is a file"),
        (check_folder, "new/" + "n" * 300, "File name too long"),
        (check_folder, "circle/new", "symbolic links"),
        (check_folder, "dangling", "No such file"),
    ],
)
def test_an_unwritable_path_is_refused(check: Any, name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "circle").symlink_to("circle")
    (tmp_path / "dangling").symlink_to("nowhere")
    with pytest.raises(ArgumentError, match=message):
        check("metrics", tmp_path / name)


def test_a_file_is_whole_or_not_there_where_there_is_no_room(tmp_path: Path) -> None:
    def write(name: str, path: Path, text: str, error: int = 0) -> None:
        with writing_whole(name, path) as partial:
            partial.write_text(text)
            if error:
                raise OSError(error, os.strerror(error))

    file, link = tmp_path / "m.json", tmp_path / "link.json"
    link.symlink_to(file)
    write("measure_machine", link, "first")
    with pytest.raises(ArgumentError, match=r"`measure_machine` must name a file .*No space left on device"):
        write("measure_machine", link, "half", errno.ENOSPC)
    assert link.is_symlink()
    assert file.read_text() == "first"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.json", "m.json"]
    with pytest.raises(ArgumentError, match="`plot` must name a file"):
        write("plot", Path("/dev/full"), "a picture")
