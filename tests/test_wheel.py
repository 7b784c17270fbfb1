"""The wheel, installed into a fresh environment, trains away from the clone."""

import os
import subprocess
import sys
import venv
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest

from meshpipe.version import __version__

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT = 600
"""Time-out of a command in seconds: installing may have to download."""

pytestmark = pytest.mark.slow


def run(*command: str | Path, cwd: Path, code: int = 0) -> str:
    """The standard output of a command that ends with this exit code; the environment has nothing of the tests."""
    ours = ("PYTHONPATH", "NPROC", "VIRTUAL_ENV")
    environment: Mapping[str, str] = {name: value for name, value in os.environ.items() if name not in ours}
    result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=TIMEOUT)
    shown = f"{command} ended with {result.returncode}\n{result.stdout}\n{result.stderr}"
    assert result.returncode == code, shown
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, ROOT, cwd=folder)
    (file,) = folder.glob(f"meshpipe-{__version__}-*.whl")
    return file


@pytest.fixture(scope="module")
def programs(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of programs of a new environment that has the wheel and what it asks for."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=True)
    run(folder / "bin" / "python", "-m", "pip", "install", "--quiet", wheel, cwd=folder)
    return folder / "bin"


def test_the_wheel_has_the_package_and_the_recipes(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    package = {str(file.relative_to(ROOT)) for file in (ROOT / "meshpipe").rglob("*.py")}
    recipes = {f"meshpipe/shipped_recipes/{file.name}" for file in (ROOT / "recipes").glob("*.py")}
    assert package | recipes | {"meshpipe/py.typed"} <= names
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"meshpipe"}
    (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
    text = zipfile.ZipFile(wheel).read(metadata).decode()
    assert "\n# meshpipe\n" in text
    assert "](docs/" not in text, "a package index has no such file"
    for extra in ("cuda12", "cuda13", "tpu"):
        assert f"\nRequires-Dist: jax[{extra}]; extra == '{extra}'\n" in text


def test_away_from_the_clone(programs: Path, tmp_path: Path) -> None:
    meshpipe = programs / "meshpipe"
    where = run(programs / "python", "-c", "import meshpipe; print(meshpipe.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(programs.parent)
    assert run(meshpipe, "--version", cwd=tmp_path) == f"meshpipe {__version__}\n"
    assert "\ntext_classifier:pipeline " in run(meshpipe, "recipes", cwd=tmp_path)

    layout = ["--mesh.pipeline", "2", "--num-microbatches", "2", "--batch-size", "4"]
    short = ["--steps", "2", "--eval-batches", "1"]
    out = run(meshpipe, "train", "text_classifier:single", *layout, *short, cwd=tmp_path)
    assert "pipeline 2 x data 1 x tensor 1" in out
    assert "Completed after step 2 of 2" in out
    assert sorted(tmp_path.iterdir()) == []

    run(meshpipe, "init", "mine", cwd=tmp_path)
    run(meshpipe, "plan", "text_classifier:pipeline", "--plot", "plan.png", cwd=tmp_path / "mine")
    assert (tmp_path / "mine" / "plan.png").read_bytes().startswith(b"\x89PNG")
