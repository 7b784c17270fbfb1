"""Two processes that begin with published weights have the losses of one, and each reads the tensors of its stage."""

import json
import shutil
from collections import Counter
from pathlib import Path

import golden
import pytest
from processes import ROOT, run_processes

from meshpipe.weights import WeightsFolder

SCRIPT = str(Path(__file__).parent / "count_reads.py")
RECIPE = f"{ROOT / 'tests' / 'published_recipes.py'}:pipeline"
Reads = Counter[str]
"""Bytes that were read of each tensor."""


def run(name: str, count: int, folder: Path) -> tuple[list[float], list[Reads]]:
    """The losses of a run, and what each of its processes reads of the tensors."""
    folder.mkdir()
    weights = golden.FOLDER / name
    command = [SCRIPT, "train", RECIPE, "--init-from", str(weights), "--metrics", "metrics.jsonl"]
    ended = run_processes(count, command, folder)
    assert not any(ended.codes), ended
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    losses = [line["loss"] for line in lines if line["event"] == "step"]
    return losses, [by_tensor(WeightsFolder(weights), folder / f"reads-{number}") for number in range(count)]


def by_tensor(folder: WeightsFolder, reads: Path) -> Reads:
    found: Reads = Counter()
    for file, offset, size in map(str.split, reads.read_text().splitlines()):
        begin, end = int(offset), int(offset) + int(size)
        (name,) = (
            name
            for name, tensor in folder.tensors.items()
            if tensor.file.name == file and tensor.offset <= begin and end <= tensor.offset + tensor.nbytes
        )
        found[name] += int(size)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama2"])
def test_two_processes_begin_as_one_and_read_their_own_tensors(name: str, tmp_path: Path) -> None:
    alone, (whole,) = run(name, 1, tmp_path / "1")
    together, (first, second) = run(name, 2, tmp_path / "2")
    assert len(alone) == 2
    assert together == alone
    sizes = {tensor: found.nbytes for tensor, found in WeightsFolder(golden.FOLDER / name).tensors.items()}
    of_first = {tensor for tensor in sizes if tensor.startswith(("model.embed_tokens.", "model.layers.0."))}
    assert whole == sizes
    assert first == {tensor: sizes[tensor] for tensor in of_first}
    assert second == {tensor: sizes[tensor] for tensor in sizes.keys() - of_first}


@pytest.mark.slow
@pytest.mark.parametrize("command", ["train", "generate"])
def test_other_weights_in_one_process_are_refused(command: str, tmp_path: Path) -> None:
    """A folder of the same model on each machine, by any name, one of them tuned further."""
    one, other = (shutil.copytree(golden.FOLDER / "qwen2", tmp_path / name) for name in ("one", "other"))
    content = bytearray((other / "model.safetensors").read_bytes())
    content[len(content) // 2 :] = content[len(content) // 2 :][::-1]
    (other / "model.safetensors").write_bytes(content)
    call = ["-m", "meshpipe", command, *((RECIPE, "--init-from") if command == "train" else ())]
    rest = [] if command == "train" else ["--prompt", "a", "--mesh.pipeline", "2"]
    ended = run_processes(2, call, tmp_path, own=[[str(folder), *rest] for folder in (one, other)])
    assert ended.codes == [2, 2], ended
    for log in ended.logs:
        assert "whose files differ between process 0 and 1. Name a folder on a file system that they share" in log, log
