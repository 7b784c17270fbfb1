"""Prepared folders as data for training: resumed at any window, mixed by weight, and refused where they do not fit."""

import json
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from tiny_tokenizer import TEXT, make_tokenizer

from meshpipe.data import MixedWindows, PreparedConfig, PreparedWindows, batches, check_limits
from meshpipe.data.preparation import PrepareConfig, prepare
from meshpipe.errors import ArgumentError

WORDS = " ".join(TEXT).split()
LENGTH = 16


def make(
    folder: Path, name: str, documents: int, *, held_out: float = 0.2, length: int = LENGTH, vocab: int = 320
) -> Path:
    """A prepared folder whose documents begin with a word of its own."""
    rng = random.Random(name)
    source = folder / f"{name}.jsonl"
    lines = (json.dumps({"text": f"{name} {' '.join(rng.choices(WORDS, k=12))}"}) for _ in range(documents))
    source.write_text("\n".join(lines))
    tokenizer = make_tokenizer(folder / f"tokenizer{vocab}", vocab_size=vocab)
    config = PrepareConfig(
        sources=(str(source),),
        tokenizer=str(tokenizer),
        to=str(folder / name),
        sequence_length=length,
        held_out=held_out,
    )
    return prepare(config, lambda text: None).folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("prepared")
    made = {name: make(folder, name, documents) for name, documents in (("large", 200), ("small", 40))}
    made["longer"] = make(folder, "longer", 40, length=LENGTH + 1)
    made["other"] = make(folder, "other", 40, vocab=310)
    made["alone"] = make(folder, "alone", 40, held_out=0.0)
    return made


def rows(batch: dict[str, np.ndarray]) -> list[bytes]:
    return [window.tobytes() for window in batch["inputs"]]


def test_a_run_continues_inside_a_prepared_folder_with_the_same_tokens(folders: dict[str, Path]) -> None:
    config = PreparedConfig(path=str(folders["large"]))
    whole = batches(config.train_source(), 8, seed=3)
    expected = [rows(next(whole)) for _ in range(12)]
    assert len({window for batch in expected for window in batch}) > 80
    first = batches(config.train_source(), 8, seed=3)
    for _ in range(5):
        next(first)
    state = json.loads(json.dumps(first.get_state()))
    second = batches(config.train_source(), 4, seed=3)
    second.set_state(state)
    assert [window for _ in range(14) for window in rows(next(second))] == [w for batch in expected[5:] for w in batch]
    other = batches(PreparedConfig(path=str(folders["small"])).train_source(), 8, seed=3)
    with pytest.raises(ValueError, match=r"only for the same data and order. Got source"):
        other.set_state(state)


def test_a_mixture_keeps_its_weights_at_every_length_and_reads_every_window(folders: dict[str, Path]) -> None:
    weights = {"large": 3.0, "small": 5.0}
    config = PreparedConfig(mixture=tuple((str(folders[name]), weight) for name, weight in weights.items()))
    source = config.train_source()
    assert isinstance(source, MixedWindows)
    windows = {name: PreparedWindows(folders[name]) for name in weights}
    home = {windows[name][i]["inputs"].tobytes(): name for name in weights for i in range(len(windows[name]))}
    assert len(home) == sum(map(len, windows.values()))
    read = [source[index]["inputs"].tobytes() for index in range(len(source))]
    is_small = np.array([home[window] == "small" for window in read])
    counts = np.cumsum(is_small)
    np.testing.assert_allclose(counts, np.arange(1, len(read) + 1) * 5 / 8, atol=1)
    assert set(read) == set(home)  # one pass reads all
    assert len(read) - len(windows["large"]) * 8 / 3 < 4
    shuffled = batches(source, 8, seed=1)
    drawn = [home[window] == "small" for _ in range(40) for window in rows(next(shuffled))]
    assert abs(np.mean(drawn) - 5 / 8) < 0.08


@pytest.mark.parametrize("weights", [(0.7, 0.3), (0.1, 0.2, 0.7), (1.0, 1e-3, 5.0, 0.4)])
def test_mixtures_of_any_weights_keep_them(weights: tuple[float, ...], folders: dict[str, Path]) -> None:
    names = ("large", "small", "alone", "large")[: len(weights)]
    source = MixedWindows(
        [_Numbered(place, len(PreparedWindows(folders[n]))) for place, n in enumerate(names)], weights
    )
    length = min(len(source), 3000)
    read = [(int(source[index]["place"]), int(source[index]["index"])) for index in range(length)]
    for place, weight in enumerate(weights):
        counts = np.cumsum([home == place for home, _ in read])
        np.testing.assert_allclose(counts, np.arange(1, length + 1) * weight / sum(weights), atol=len(weights) - 1)
        seen = [index for home, index in read if home == place]
        assert seen == [index % source._sources[place].size for index in range(len(seen))]
    if length == len(source):
        assert {(place, i) for place, one in enumerate(source._sources) for i in range(one.size)} <= set(read)


class _Numbered(PreparedWindows):
    """Stands for a source; an example is the number of the source and that of the window."""

    def __init__(self, place: int, size: int) -> None:
        self.place, self.size = place, size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {"place": np.asarray(self.place), "index": np.asarray(index)}


def test_a_run_continues_inside_a_mixture(folders: dict[str, Path]) -> None:
    mixture = ((str(folders["large"]), 1.0), (str(folders["small"]), 2.0))
    first = batches(PreparedConfig(mixture=mixture).train_source(), 8)
    taken = [rows(next(first)) for _ in range(6)]
    second = batches(PreparedConfig(mixture=mixture).train_source(), 8)
    second.set_state({**first.get_state(), "examples": 24})
    assert [rows(next(second)) for _ in range(3)] == taken[3:]
    other = batches(PreparedConfig(mixture=(mixture[0], (mixture[1][0], 3.0))).train_source(), 8)
    with pytest.raises(ValueError, match="only for the same data and order"):
        other.set_state(first.get_state())


def test_a_weight_that_no_pass_can_keep_is_refused(folders: dict[str, Path]) -> None:
    for weight in (1e-300, 1e300):
        mixture = PreparedConfig(mixture=((str(folders["large"]), 1.0), (str(folders["small"]), weight)))
        with pytest.raises(ValueError, match=r"`mixture` must have weights .* Raise the smallest"):
            mixture.train_source()


def test_held_out_windows_are_others_and_in_a_random_order(folders: dict[str, Path]) -> None:
    config = PreparedConfig(path=str(folders["large"]))
    train, held_out = config.train_source(), config.eval_source()
    training = {train[i]["inputs"].tobytes() for i in range(len(train))}
    evaluated = [held_out[i]["inputs"].tobytes() for i in range(len(held_out))]
    assert not training & set(evaluated)
    again = PreparedConfig(path=str(folders["large"])).eval_source()
    assert [again[i]["inputs"].tobytes() for i in range(len(again))] == evaluated
    assert "split=eval" in repr(held_out)


def test_a_vocabulary_larger_than_that_of_the_model_is_refused(folders: dict[str, Path]) -> None:
    mixture = PreparedConfig(mixture=((str(folders["large"]), 1.0), (str(folders["small"]), 1.0)))
    for source in (PreparedConfig(path=str(folders["large"])).train_source(), mixture.train_source()):
        check_limits(source, {"inputs": 320, "targets": 320})
        with pytest.raises(ValueError, match="prepared with a tokenizer of 320 tokens, for a model of 319"):
            check_limits(source, {"inputs": 319, "targets": 319})
        check_limits(source, {"positions": 16})
        with pytest.raises(ValueError, match=r"with windows of 16 tokens, for a model of 15 positions. Prepare"):
            check_limits(source, {"positions": 15})


@pytest.mark.parametrize(
    ("names", "problem"),
    [
        (["large", "longer"], "must have one sequence length. Got 16 in .*/large and 17 in .*/longer"),
        (["large", "other"], "must have one tokenizer"),
        (["large", "alone"], "alone, prepared without any. Prepare it with --held-out 0.01, or turn evaluation off"),
    ],
)
def test_folders_that_do_not_go_together_are_refused(names: list[str], problem: str, folders: dict[str, Path]) -> None:
    config = PreparedConfig(mixture=tuple((str(folders[name]), 1.0) for name in names))
    with pytest.raises(ValueError, match=problem):
        config.eval_source()


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({}, "Got neither. Pass `path`"),
        ({"path": "a", "mixture": (("b", 1.0),)}, "Got both. To mix, set `path` to None"),
        ({"mixture": (("a", 0.0),)}, "`mixture` must be above 0"),
        ({"mixture": (("a", float("inf")),)}, "must have finite weights"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        PreparedConfig(**arguments)


def test_a_folder_that_is_not_whole_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    def open_copy() -> PreparedWindows:
        return PreparedWindows(tmp_path / "copy")

    with pytest.raises(
        ValueError, match=r"must name a folder that `meshpipe data prepare` has written.*without prepared"
    ):
        open_copy()
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in folders["large"].iterdir():
        if file.is_file():
            (copy / file.name).write_bytes(file.read_bytes())
    assert open_copy()[0]["inputs"].shape == (LENGTH,)
    file = copy / "train-00000.array_record"
    content = file.read_bytes()
    file.write_bytes(content[:-10])
    with pytest.raises(ValueError, match=r"train-00000.array_record has .* bytes in place of"):
        open_copy()
    file.write_bytes(bytes(len(content)))
    with pytest.raises(ValueError, match=r"Window 0 of .* cannot be read: .*meshpipe data verify"):
        open_copy()[0]
    file.unlink()
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        open_copy()
    found = json.loads((copy / "prepared.json").read_text())
    (copy / "prepared.json").write_text(json.dumps({**found, "format": 2}))
    with pytest.raises(ValueError, match="of format 2; this version of meshpipe reads format 1"):
        open_copy()
    (copy / "prepared.json").write_text(json.dumps({**found, "counts": 3}))
    with pytest.raises(ValueError, match=r"prepared.json is not as it was written"):
        open_copy()


DAMAGE = {
    "another folder": ({"files": {"name": "../large/train-00000.array_record"}}, "file is RecordFile"),
    "more records than bytes": ({"files": {"records": 10**9}}, "file is RecordFile"),
    "fewer records": ({"files": {"records": 1}}, "number of records of train is 1"),
    "length": ({"sequence_length": 10**12}, "sequence_length is 1000000000000"),
    "dtype": ({"dtype": "O"}, "dtype is 'O'"),
    "NaN": ({"vocab_size": float("nan")}, "NaN is not a number"),
    "bad lines": ({"bad_lines": ["one"]}, "bad_lines is"),
    "deep": ("[" * 10**5, "nested more than 64"),
    "list": ("[1]", "is not as it was written"),
    "twice": ('{"format": 1, "format": 1}', "has 'format' twice"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_hostile_manifest_is_refused(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    change, problem = DAMAGE[name]
    folder = shutil.copytree(folders["small"], tmp_path / "small")
    manifest = folder / "prepared.json"
    if isinstance(change, dict):
        found = json.loads(manifest.read_text())
        found["files"]["train"][0].update(change.pop("files", {}))
        change = json.dumps(found | change)
    manifest.write_text(change)
    with pytest.raises(ValueError, match=rf"written\. Got .*small.*{problem}.*[Pp]repare it again"):
        PreparedWindows(folder)


def test_a_manifest_that_is_a_pipe_or_describes_other_windows_is_refused(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(folders["small"], tmp_path / "small")
    manifest = folder / "prepared.json"
    text = manifest.read_text()
    for change in ('"sequence_length": 8', '"dtype": "<u4"'):
        name = change.partition(":")[0]
        lines = (f" {change}," if line.startswith(f" {name}:") else line for line in text.split("\n"))
        manifest.write_text("\n".join(lines))
        with pytest.raises(ValueError, match=r"Window 0 of .* cannot be read: .*data verify"):
            PreparedWindows(folder)[0]
    manifest.unlink()
    os.mkfifo(manifest)
    with pytest.raises(ArgumentError, match="is not a regular file"):
        PreparedWindows(folder)
