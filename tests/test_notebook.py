"""A real notebook, executed by a real kernel: live progress, tables, signals left alone, and what a late call says."""

from pathlib import Path
from typing import Any

import nbclient
import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]
CELLS = [
    f"import sys\nsys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n"
    "import signal\nfrom dataclasses import replace\n"
    "import meshpipe, tiny_recipes\nmeshpipe.use_cpu_devices(2)\nbefore = signal.getsignal(signal.SIGINT)",
    "result = meshpipe.run(replace(tiny_recipes.pipeline(), steps=30, eval_every=10))\nresult",
    "assert signal.getsignal(signal.SIGINT) is before\nassert len(result.losses) == 30\nresult.trainer",
    "result.trainer.step(next(iter(meshpipe.data.batches(tiny_recipes.Points(16, 8), 16))))",
    "try:\n    meshpipe.use_cpu_devices(64)\nexcept ValueError as error:\n    print(error)",
    "try:\n    meshpipe.run(replace(tiny_recipes.pipeline(), data=tiny_recipes.PointsConfig(poisoned=3, count=32)))\n"
    "except meshpipe.NonFiniteError as error:\n    print(error, *error.__notes__)",
    "result = meshpipe.run(replace(tiny_recipes.pipeline(), run_dir='kept'))\n"
    "len(meshpipe.load('kept')), open('kept/log.txt').read()",
]


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in CELLS])
    folder = str(tmp_path_factory.mktemp("notebook"))
    resources = {"metadata": {"path": folder}}
    nbclient.NotebookClient(notebook, timeout=180, kernel_name="python3", resources=resources).execute()
    print(nbformat.writes(notebook))  # shown when a test fails
    return [cell.outputs for cell in notebook.cells]


def text(outputs: list[Any]) -> str:
    found = [output.get("text") or output.get("data", {}).get("text/plain", "") for output in outputs]
    return "\n".join(found)


@pytest.mark.slow
def test_a_run_shows_a_live_line_and_a_table(executed: list[Any]) -> None:
    run = executed[1]
    assert not [output for output in run if output.get("name") == "stderr"]
    data = [output["data"] for output in run if "data" in output]
    assert any("application/vnd.jupyter.widget-view+json" in found for found in data)
    assert "held out: loss" in text(run)
    assert "RunResult(completed after step 30, loss" in text(run)
    assert any("<th>step</th><th>loss</th>" in found.get("text/html", "") for found in data)


@pytest.mark.slow
def test_results_have_reprs_of_one_line_and_signals_are_left_alone(executed: list[Any]) -> None:
    assert text(executed[2]).startswith("Trainer(4 layers on pipeline 2")
    assert text(executed[3]).startswith("StepResult(step 31: loss")


@pytest.mark.slow
def test_a_late_call_says_to_restart_the_kernel(executed: list[Any]) -> None:
    assert "with 2 started. Restart the kernel. Call meshpipe.use_cpu_devices" in text(executed[4])


@pytest.mark.slow
def test_a_failure_is_raised_in_its_cell(executed: list[Any]) -> None:
    assert "is not finite" in text(executed[5])
    assert "Nothing was saved." in text(executed[5])


@pytest.mark.slow
def test_the_log_of_a_run_folder_is_a_file_and_not_a_second_output(executed: list[Any]) -> None:
    run = text(executed[6])
    assert run.count("Compiled and initialised in") == 2  # once printed, once in the file that was read
    assert "(8," in run
