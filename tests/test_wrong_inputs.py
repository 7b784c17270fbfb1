"""Wrong inputs to the library: a message with the rule and the way out, or the user's own error with a note."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from wrong_inputs import CASES

TESTS = Path(__file__).parent
ERRORS = {"ValueError", "ArgumentError"}
OWN = {"KeyError", "NameError", "RuntimeError", "TypeError", "TracerArrayConversionError", "TracerBoolConversionError"}
"""Errors of user's code, which keep their type; all others are ValueErrors."""


@pytest.fixture(scope="module")
def outcomes() -> dict[str, list[str]]:
    environment = os.environ | {"PYTHONPATH": str(TESTS.parent)}
    command = [sys.executable, str(TESTS / "wrong_inputs.py")]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.parametrize("name", CASES)
def test_what_is_wrong_is_said(name: str, outcomes: dict[str, list[str]]) -> None:
    kind, message = outcomes[name]
    assert re.search(CASES[name][1], message if kind in ERRORS else f"{kind}: {message}", re.DOTALL), message
    assert kind in ERRORS or (kind in OWN and "\nThis comes from" in message)
