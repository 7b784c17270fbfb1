"""Processes with different programs report it before anything moves, in the library and on the command line."""

import json
from pathlib import Path

import pytest
from processes import ROOT, run_processes

SCRIPT = str(Path(__file__).parent / "differing_trainers.py")
RECIPE = f"{ROOT / 'tests' / 'tiny_recipes.py'}:pipeline"
EXPECTED = {
    "learning rate": ["differs in update of the optimizer, numbers in it (-0.2, not -0.1)"],
    "schedule of rates": ["differs in update of the optimizer"],
    "clipping": ["differs in clip norm (1.0, not None)"],
    "seed": ["differs in seed (1, not 0)"],
    "microbatches": [
        "differs in plan (1f1b of 2 stages on 2 ranks, 4 microbatches, not 1f1b of 2 stages on 2 ranks, 2 mi"
    ],
    "schedule": ["differs in plan (gpipe of 2 stages on 2 ranks, 2 microbatches, not 1f1b of"],
    "loss": ["differs in code of the loss"],
    "number of layers": ["differs in number of layers (3, not 2)"],
    "layers": ["differs in trained parameters, parameters and state of stage 1, code of the layers of stage 1"],
    "ready-made weights": ["differs in code of the layers of stage 0, code of the layers of stage 1"],
    "tied": ['differs in tied parameters ([["layers/0/kernel", "layers/1/kernel"]], not [])'],
    "failure": ["no such vocabulary"],
}


def test_trainers_that_differ_are_refused_in_every_process(tmp_path: Path) -> None:
    ended = run_processes(2, [SCRIPT], tmp_path)
    assert ended.codes == [0, 0], ended
    for log in ended.logs:
        (heard,) = (json.loads(line[7:]) for line in log.splitlines() if line.startswith("RESULT "))
        for name, parts in EXPECTED.items():
            assert all(part in heard[name] for part in parts), (name, heard[name])
    assert "process 1 failed: OSError: no such vocabulary" in ended.logs[0]


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--steps 4", "process 1 differs in --steps (4, not 6)"),
        ("--learning-rate 0.5 --clip-norm 0.1", "--clip-norm (0.1, not None)"),
        pytest.param("--eval-every 2", "differs in --eval-every (2, not 0)", marks=pytest.mark.slow),
        pytest.param("--checkpoint-dir run", "differs in --checkpoint-dir (a path, not none)", marks=pytest.mark.slow),
        pytest.param("--data.count 99", "differs in --data.count (99, not 512)", marks=pytest.mark.slow),
    ],
)
def test_commands_that_differ_end_with_code_2(flags: str, sentence: str, tmp_path: Path) -> None:
    ended = run_processes(2, ["-m", "meshpipe", "train", RECIPE], tmp_path, [[], flags.split()])
    assert ended.codes == [2, 2], ended
    for log in ended.logs:
        assert sentence in log, ended
        assert "Traceback" not in log, ended
        assert "Compiled" not in log, ended


@pytest.fixture(scope="module")
def bytes_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a language model on bytes."""
    folder = tmp_path_factory.mktemp("bytes")
    language = f"{ROOT / 'recipes' / 'language_model.py'}:debug"
    train = ["-m", "meshpipe", "train", language, "--steps", "1", "--run-dir", "run", "--eval-batches", "0"]
    ended = run_processes(1, train, folder)
    assert ended.codes == [0], ended
    return folder / "run"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "flags", "sentence"),
    [
        ("generate", "--mesh.pipeline 1 --mesh.data 2", "process 1 differs in mesh ({'pipeline': 1, 'data': 2"),
        ("generate", "--in-flight 3", "process 1 differs in groups in flight (3, not 2)"),
        ("eval", "--mesh.pipeline 1 --mesh.data 2", "process 1 differs in mesh ({'pipeline': 1, 'data': 2"),
        ("eval", "--batches 1", "process 1 differs in batches (1, not 0)"),
    ],
)
def test_uses_of_a_model_that_differ_end_with_code_2(
    command: str, flags: str, sentence: str, tmp_path: Path, bytes_run: Path
) -> None:
    (tmp_path / "text.txt").write_text("to be or not to be\n" * 400)
    what = ["--prompt", "a", "--max-tokens", "2"] if command == "generate" else ["--data", "text.txt"]
    call = ["-m", "meshpipe", command, str(bytes_run), *what, "--mesh.pipeline", "2"]
    ended = run_processes(2, call, tmp_path, [[], flags.split()])
    assert ended.codes == [2, 2], ended
    for log in ended.logs:
        assert sentence in log, ended
        assert "Traceback" not in log, ended
