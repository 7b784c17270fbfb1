"""The help of a command is whole, grouped and as wide as the terminal; a wrong flag leads to the right one."""

import itertools
import re
from dataclasses import make_dataclass
from pathlib import Path
from typing import Annotated

import jax
import pytest
import tiny_recipes
import tyro

from meshpipe.cli import main
from meshpipe.cli.flags import OTHER_NAMES, flags_of, suggestion
from meshpipe.cli.help import COMMON
from meshpipe.config import Config
from meshpipe.pipeline.remat import REMAT_POLICIES
from meshpipe.plan.schedules import SCHEDULES

TINY = f"{Path(tiny_recipes.__file__)}:single"
CONFIG = tiny_recipes.single()
LISTED = re.compile(r"^[│ ] --([a-z][\w.-]*)", re.MULTILINE)
"""A flag in a box, which has no lines where the output is no terminal."""
NAMES = [flag.name for flag in flags_of(CONFIG)]


def shown(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(arguments) == 0
    return capsys.readouterr().out


def paragraph(text: str, flag: str) -> str:
    """The help of a flag, in one line."""
    lines = iter([line.strip("│ ") for line in text.splitlines()])
    found = next(line for line in lines if re.match(rf"{flag}\b", line))
    for line in lines:
        if line.startswith("--"):
            break
        found += " " + line
    return " ".join(found.split())


@pytest.mark.parametrize("columns", [80, 120])
def test_help_shows_the_common_flags_and_where_the_others_are(
    columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    text = shown(["train", TINY, "--help"], capsys)
    assert LISTED.findall(text) == ["help-all", *COMMON]
    assert {len(line) for line in text.splitlines() if line.startswith("  ")} == {columns}
    assert text.rstrip().endswith("flags, among them those of the model and the data.")


def test_long_help_has_every_flag_that_the_parser_takes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    text = shown(["train", TINY, "--help-all"], capsys)
    kind = make_dataclass("Flags", [("config", Annotated[Config, tyro.conf.arg(name="")], CONFIG)])
    with pytest.raises(SystemExit):
        tyro.cli(kind, args=["--help"])
    parsers = set(LISTED.findall(capsys.readouterr().out))
    assert parsers == set(NAMES)
    listed = LISTED.findall(text)
    assert len(listed) == len(set(listed))
    assert parsers < set(listed)
    assert {"coordinator", "step-timeout"} < set(listed)
    titles = re.findall(r"^ ((?:\w+ )?options) +$", text, re.MULTILINE)
    assert titles[:3] == ["options", "training options", "optimizer options"]
    assert titles[-1] == "processes options"


def test_long_help_lists_schedules_and_policies(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = shown(["train", TINY, "--help-all"], capsys)
    for flag, names in (("--schedule", SCHEDULES.keys() - {"inference"}), ("--remat", REMAT_POLICIES)):
        for name in (*names, "auto"):
            assert f"`{name}`" in paragraph(text, flag)


def test_paragraphs_fill_their_lines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A word that would have fitted on the line before means that a paragraph was cut."""
    monkeypatch.setenv("COLUMNS", "80")
    text = shown(["train", TINY, "--help-all"], capsys)
    assert_paragraphs_are_filled(text)


def assert_paragraphs_are_filled(text: str) -> None:
    """No line of a help text ends where the first word of the next would still fit."""
    lines = [line[2:-2] for line in text.splitlines() if line.startswith("  ")]
    for before, after in itertools.pairwise(lines):
        if re.match(" {4,}\\S", before) and re.match(" {4,}\\S", after):
            assert len(before.rstrip()) + 1 + len(after.split()[0]) > len(before), (before, after)


def test_a_commands_own_flags_come_first(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(["plan", TINY, "--help"], capsys)
    assert text.index("plan options") < text.index("common options")
    assert "--compare" in text
    assert "--coordinator" not in text


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        ("plan", ["target", "compare", "save-costs"]),
        ("advise", ["target", "compile", "usable-memory"]),
        ("verify", ["updates"]),
        ("data prepare", ["tokenizer", "packing", "part-size"]),
        ("weights export", ["dtype", "adapters", "largest-file"]),
        ("eval", ["mesh.tensor", "batches", "process-id"]),
        ("generate", ["mesh.tensor", "prompt", "top-k", "in-flight", "process-id"]),
    ],
)
def test_help_without_a_recipe_has_the_flags_of_the_command_and_whole_paragraphs(
    command: str, flags: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    text = shown([*command.split(), "--help"], capsys)
    assert {*flags} <= {*LISTED.findall(text)}
    assert "(default: )" not in text
    assert_paragraphs_are_filled(text)


@pytest.mark.parametrize(
    ("flag", "meant"),
    [
        ("--lr", "learning-rate"),
        ("--learningrate", "learning-rate"),
        ("--batch_sizes", "batch-size"),
        ("--pipeline", "mesh.pipeline"),
        ("--model.dept", "model.depth"),
        ("--tp=2", "mesh.tensor"),
        ("--output-dir", "run-dir"),
    ],
)
def test_a_wrong_flag_leads_to_the_right_one(flag: str, meant: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", TINY, flag, "1"]) == 2
    error = capsys.readouterr().err
    assert f"There is no flag {flag.partition('=')[0]} for train with this recipe. Did you mean --{meant}? " in error
    assert "--help-all lists all flags." in error


def test_a_flag_like_no_other_gets_no_suggestion(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", TINY, "--xyzzy"]) == 2
    assert (
        "There is no flag --xyzzy for train with this recipe. meshpipe train RECIPE --help-all"
        in capsys.readouterr().err
    )
    assert main(["train", TINY, "60"]) == 2
    assert "After the recipe come flags. Got '60'." in capsys.readouterr().err


def test_other_names_lead_to_flags_that_exist() -> None:
    assert set(OTHER_NAMES.values()) <= set(NAMES)
    assert suggestion("--lr", ["steps"]) == ""


@pytest.mark.parametrize(
    ("flags", "phrase"), [(["--schedule", "1f1"], "Did you mean 1f1b?"), (["--remat", "ful"], "Did you mean full?")]
)
def test_a_wrong_value_leads_to_the_right_one(
    flags: list[str], phrase: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert jax.device_count() == 8, "or the command would fix a smaller number for all later tests"
    assert main(["plan", TINY, *flags]) == 2
    assert phrase in " ".join(re.sub(r"[│╭╮╰╯─]", " ", capsys.readouterr().err).split())
