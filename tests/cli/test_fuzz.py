"""Hundreds of wrong calls: each quickly gives exit code 2 and one message, without traceback, compilation or output."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from meshpipe.cli import main
from tests.cli.wrong_calls import ROOT, wrong_call

CALLS = 320
MAX_SECONDS = 20.0


def contents(folder: Path) -> dict[str, bytes | str]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else str(path.is_symlink())
        for path in folder.rglob("*")
        if "__pycache__" not in path.parts
    }


def complaint(code: object, error: str, seconds: float, changed: bool) -> str | None:
    """The fault in the answer to a wrong call; None if there is none."""
    messages = error.count("meshpipe: ") + error.count("For full helptext")
    if code != 2:
        return f"exit code {code}"
    if "Traceback" in error or "Warning" in error:
        return "more than a message"
    if messages != 1:
        return f"{messages} messages"
    if len(error) > 6000:
        return f"a message of {len(error)} characters"
    if changed:
        return "the folder has changed"
    return f"{seconds:.0f} s" if seconds > MAX_SECONDS else None


@pytest.mark.slow
def test_wrong_calls_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def must_not_compile(*arguments: object, **keywords: object) -> None:
        raise AssertionError("refused only after compiling")

    assert jax.device_count() == 8
    monkeypatch.setattr("meshpipe.stage.compile_stages.compile_stage", must_not_compile)
    monkeypatch.setattr("meshpipe.choose.profile.compile_stage", must_not_compile)
    wrong = []
    for seed in range(CALLS):
        folder = tmp_path / str(seed)
        folder.mkdir()
        monkeypatch.chdir(folder)
        call = wrong_call(seed, folder)
        before, started = contents(folder), time.process_time()
        try:
            code: object = main(call)
        except Exception as error:
            code = f"{type(error).__name__}: {error}"[:300]
        seconds, error_text = time.process_time() - started, capsys.readouterr().err
        found = complaint(code, error_text, seconds, contents(folder) != before)
        if found is not None:
            text = re.sub(r"\s+", " ", error_text)[-300:]
            wrong.append(f"{seed} {' '.join(word[-90:] for word in call)}\n    {found}: {text}")
    assert not wrong, f"{len(wrong)} of {CALLS}\n" + "\n".join(wrong)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(CALLS, CALLS + 6))
def test_wrong_calls_of_the_program_itself(seed: int, tmp_path: Path) -> None:
    call = wrong_call(seed, tmp_path)
    before = contents(tmp_path)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "meshpipe", *call]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert complaint(result.returncode, result.stderr, 0.0, contents(tmp_path) != before) is None, (call, result)


@pytest.mark.slow
@pytest.mark.parametrize("part", ["model=3", "data=None", "optimizer='adam'", "pipeline={}", "checkpoint='ck'"])
def test_parts_of_a_config_of_the_wrong_type(part: str, tmp_path: Path) -> None:
    """In a separate process, since the type checks of the tests would raise first."""
    recipe = f"from tests.tiny_recipes import *\ndef f() -> Config: return replace(pipeline(), {part})\n"
    (tmp_path / "wrong.py").write_text(recipe)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "meshpipe", "plan", "wrong.py:f"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2, result
    assert f"{part.partition('=')[0]} of a Config must be a" in result.stderr


def test_an_accepted_or_badly_answered_call_is_noticed() -> None:
    assert complaint(2, "meshpipe: --steps must be at least 0. Got -1.\n", 0.1, False) is None
    assert complaint(0, "", 0.1, False)
    assert complaint(2, "meshpipe: a\nmeshpipe: b\n", 0.1, False)
    assert complaint(2, "Traceback (most recent call last):\nmeshpipe: a\n", 0.1, False)
    assert complaint(2, "meshpipe: a\n", 0.1, True)
    assert complaint(2, "meshpipe: a\n", 60.0, False)
