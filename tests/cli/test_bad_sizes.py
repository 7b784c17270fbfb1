"""Meshes, batches and sizes that cannot be: refused with one clear message, before anything is compiled or written."""

from pathlib import Path

import pytest

from tests.cli.refused import Call, prepared, refuse

CALLS: dict[str, Call] = {
    "empty axis": ("train TINY --mesh.pipeline 0", "--mesh.pipeline must be at least 1. Got 0."),
    "more devices than there are": ("train TINY --mesh.tensor 8", "Got 16, with 8 started."),
    "batch that does not divide": ("train TINY --batch-size 10", "The nearest sizes that fit are 8 and 12."),
    "microbatch over data": ("train TINY --mesh.data 3", "must be a multiple of --num-microbatches * --mesh.data"),
    "empty batch": ("train TINY --batch-size 0", "--batch-size must be at least 1. Got 0."),
    "batch larger than the data": ("train TINY --data.count 15", "Pass a smaller --batch-size"),
    "no microbatch": ("train TINY --num-microbatches 0", "--num-microbatches must be at least 1. Got 0."),
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
    "huge mesh": ("train TINY --mesh.pipeline 100000000", "at most 4096 virtual CPU devices. Got 100,000,000."),
    "huge mesh to plan": ("plan TINY --mesh.pipeline 100000000", "at most 4096 virtual CPU devices. Got 100,000,000."),
    "no update to verify": ("verify TINY --updates 0", "--updates must be at least 1. Got 0."),
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return prepared(tmp_path, monkeypatch)


@pytest.mark.parametrize(("arguments", "phrase"), CALLS.values(), ids=CALLS)
def test_sizes_that_cannot_be(
    arguments: str | list[str], phrase: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refuse(arguments, phrase, folder, capsys)
