"""A run of several processes matches one process bit for bit, and each process has only its own stages."""

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from processes import ROOT, TIMEOUT, Ended, environment, run_processes

from meshpipe.processes.launch import free_port

SCRIPT = str(Path(__file__).parent / "train_small.py")


def results(ended: Ended) -> list[dict[str, Any]]:
    assert not any(ended.codes), ended
    lines = [line for log in ended.logs for line in log.splitlines() if line.startswith("RESULT ")]
    return [json.loads(line.removeprefix("RESULT ")) for line in lines]


CASES = [
    pytest.param(2, "--mesh 2 1 1", id="two stages in two processes"),
    pytest.param(2, "--mesh 2 1 1 --sown", id="terms of the loss", marks=pytest.mark.slow),
    pytest.param(4, "--mesh 2 2 1 --sown", id="terms and data across processes", marks=pytest.mark.slow),
    pytest.param(2, "--mesh 4 1 1 --sown --schedule zb-h1", id="terms in the middle", marks=pytest.mark.slow),
    pytest.param(4, "--mesh 4 1 1 --trainable layers/2/**", id="two stages without backward", marks=pytest.mark.slow),
    pytest.param(
        2, "--mesh 1 2 1 --sown --trainable layers/1/** layers/3/**", id="some are trained", marks=pytest.mark.slow
    ),
    pytest.param(4, "--mesh 2 2 1", id="data across processes", marks=pytest.mark.slow),
    pytest.param(2, "--mesh 1 2 1 --sharding fully-sharded", id="parameters split", marks=pytest.mark.slow),
    pytest.param(2, "--mesh 2 1 1 --schedule interleaved-1f1b --tied", id="four stages, tied", marks=pytest.mark.slow),
    pytest.param(2, "--mesh 2 1 1 --schedule zb-v", id="both ends of a V", marks=pytest.mark.slow),
    pytest.param(2, "--mesh 4 1 1 --schedule zb-h1", id="two ranks each", marks=pytest.mark.slow),
    pytest.param(2, "--mesh 2 1 1 --encoder-decoder --schedule interleaved-1f1b", id="a memory that both ranks read"),
    pytest.param(
        4, "--mesh 4 1 1 --encoder-decoder --schedule zb-h1", id="a memory for two processes", marks=pytest.mark.slow
    ),
    pytest.param(
        4, "--mesh 2 2 1 --encoder-decoder --schedule zb-v", id="a memory split over data", marks=pytest.mark.slow
    ),
    pytest.param(4, "--mesh 2 1 2", id="tensor across processes", marks=pytest.mark.slow),
    *(
        pytest.param(count, f"{flags} --transfers server", id=f"server: {what}", marks=pytest.mark.slow)
        for what, count, flags in [
            ("three hosts, tied", 3, "--mesh 3 2 1 --tied"),
            ("four hosts", 4, "--mesh 4 1 1 --schedule zb-h1"),
            ("data across hosts", 4, "--mesh 2 2 1 --sown"),
            ("a memory that several read", 4, "--mesh 4 2 1 --encoder-decoder"),
        ]
    ),
    *(
        pytest.param(count, f"--graph {graph!r} --mesh {mesh} --schedule {schedule}", marks=pytest.mark.slow)
        for count, mesh, graph, schedule in [
            (2, "4 1 1", "skip", "1f1b"),
            (4, "4 1 1", "encoder-decoder", "1f1b"),
            (2, "2 1 1", "encoder-decoder", "zb-v"),
            (4, "4 1 1", "unet", "zb-h1"),
            (2, "2 2 1", "two towers", "interleaved-1f1b"),
            (4, "4 1 1", "block residuals", "gpipe"),
            (2, "2 1 1", "two stages of a rank", "interleaved-1f1b"),
            (4, "2 2 1", "only the loss", "dualpipe-v"),
            (4, "4 1 1", "sown", "zb-h1"),
        ]
    ),
]


@pytest.mark.parametrize(("count", "flags"), CASES)
def test_several_processes_match_one(count: int, flags: str, tmp_path: Path) -> None:
    command = [SCRIPT, *shlex.split(flags)]
    (alone,) = results(run_processes(1, command, tmp_path))
    together = results(run_processes(count, command, tmp_path))
    assert len(together) == count
    for result in together:
        assert result["scalars"] == alone["scalars"]
        assert result["held out"] == alone["held out"]
        assert result["parameters"].items() <= alone["parameters"].items()
    assert {path for result in together for path in result["parameters"]} == set(alone["parameters"])
    assert sorted({s for result in together for s in result["stages"]}) == alone["stages"]
    if count == 2 and flags == "--mesh 2 1 1":
        assert [result["stages"] for result in together] == [[0], [1]]


def test_different_flags_are_reported_before_anything_moves(tmp_path: Path) -> None:
    recipe = f"{ROOT / 'tests' / 'tiny_recipes.py'}:pipeline"
    own = [["--num-microbatches", "4"], ["--num-microbatches", "8"]]
    ended = run_processes(2, ["-m", "meshpipe", "train", recipe], tmp_path, own)
    assert ended.codes == [2, 2], ended
    for log in ended.logs:
        assert "process 1 differs in --num-microbatches (8, not 4)" in log
        assert "Traceback" not in log


@pytest.mark.slow
@pytest.mark.parametrize("cluster", ["Slurm", "Open MPI"])
def test_tasks_that_a_cluster_started_find_each_other(cluster: str, tmp_path: Path) -> None:
    """Only by the environment variables of such a task, which the test sets."""

    job = free_port()  # JAX makes the coordinator's port from the number of the job

    def variables(number: int) -> dict[str, str]:
        if cluster == "Slurm":
            size = {"SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "1"}
            place = {"SLURM_STEP_NODELIST": "localhost", "SLURM_PROCID": str(number), "SLURM_LOCALID": str(number)}
            return {"SLURM_JOB_ID": str(job)} | size | place
        rank = {f"OMPI_COMM_WORLD_{which}": str(number) for which in ("RANK", "LOCAL_RANK")}
        return {"OMPI_MCA_orte_hnp_uri": f"{job << 12}.0;tcp://127.0.0.1:1", "OMPI_COMM_WORLD_SIZE": "2"} | rank

    command = [sys.executable, "-m", "meshpipe", "train", f"{ROOT / 'tests' / 'tiny_recipes.py'}:pipeline"]
    tasks = [
        subprocess.Popen(
            command,
            cwd=tmp_path,
            env=environment(**variables(number)),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number in range(2)
    ]
    try:
        output = [task.communicate(timeout=TIMEOUT)[0] for task in tasks]
    finally:
        for task in tasks:
            task.kill()
    assert [task.wait() for task in tasks] == [0, 0], "".join(output)
    assert "2 virtual CPU devices of 2 processes" in output[0]
    assert "Completed after step 6 of 6" in output[0]
