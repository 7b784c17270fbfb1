"""Runs the quick tests with the newest releases of all dependencies, whatever the upper bounds in pyproject.toml say.

    python tests/newest.py [--pre] [ARGUMENTS OF PYTEST ...]

Makes a virtual environment in a temporary folder, installs into it what pyproject.toml asks for without upper bounds
(with `--pre` also releases that are not final), prints the versions, and runs pytest. When all pass, raise the bounds.
"""

import argparse
import re
import subprocess
import sys
import tempfile
import tomllib
import venv
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def without_upper_bounds(requirements: Iterable[str]) -> list[str]:
    """The requirements with nothing but their lower bounds; `~=` becomes the lower bound that it includes."""
    found = []
    for requirement in requirements:
        match = re.fullmatch(r"([A-Za-z0-9._-]+(?:\[[^]]*\])?)\s*(.*)", requirement)
        assert match is not None, requirement
        bounds = [bound.strip() for bound in match[2].split(",")]
        lower = [">=" + re.split("[=~>]=", bound)[1].strip() for bound in bounds if re.match("(==|~=|>=)", bound)]
        found.append(match[1] + ",".join(lower))
    return found


def requirements() -> list[str]:
    """What the project and its tests need."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return without_upper_bounds([*project["dependencies"], *project["optional-dependencies"]["test"]])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pre", action="store_true", help="also releases that are not final")
    flags, arguments = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = Path(folder) / "bin" / "python"
        install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        pre = ["--pre"] if flags.pre else []
        subprocess.run([*install, "--upgrade", "--upgrade-strategy", "eager", *pre, *requirements()], check=True)
        subprocess.run([*install, "--no-deps", "--editable", ROOT], check=True)
        subprocess.run([python, "-m", "pip", "list", "--disable-pip-version-check"], check=True)
        return subprocess.run([python, "-m", "pytest", *arguments], cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main())
