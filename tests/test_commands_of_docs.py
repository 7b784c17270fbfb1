"""The commands in README and docs: the real parser takes each of them, with its recipe, flags and values."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import golden
import pytest
import tyro
from documentation import PAGES, ROOT, fenced_lines, prose

from meshpipe.cli import main

STAND_INS = {
    "RECIPE": "language_model:pipeline",
    "FILE.py:FUNCTION": "language_model:pipeline",
    "counting.py:pipeline_data": "language_model:pipeline_data",
    "my_recipe:tuned": "finetune:full --init-from Llama-3.2-1B",
    "NAME": "1f1b",
    "N": "2",
    "HOST:PORT": "localhost:1234",
}
"""Words of the documentation, and what the parser gets in their place."""
WEIGHTS = ("Llama-3.2-1B", "Llama-3.1-8B-Instruct", "Qwen3-0.6B", "imported")
"""Folders of published weights that commands name."""
WITHOUT_FLAGS = {"recipes"}
REFUSED = "train text_classifier:pipeline --batch-size 100"
"""What docs/limits.md shows the message of."""
GROUPS = "(?:checkpoint|data|weights)"
"""Commands whose second word is a command as well."""


class Parsed(BaseException):
    """Ends a command once its flags are known."""


def commands_in(text: str) -> Iterator[str]:
    """The commands in the blocks and sentences of a page, without their comments."""
    lines = [line for language, line in fenced_lines(text) if language in ("bash", "text")]
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        for part in line.partition("  #")[0].split("&&"):
            found = re.match(r"(?:JAX_PLATFORMS=cpu )?(?:\.venv/bin/)?meshpipe ([a-z].*)", part.strip())
            if found:
                yield found[1]
    for span in re.findall(r"`([^`]+)`", prose(text)):
        found = re.fullmatch(rf"meshpipe ({GROUPS} \S+ \S.*|(?!{GROUPS})\S+ \S.*)", " ".join(span.split()))
        if found and "..." not in span:
            yield found[1].removesuffix(" [flags]")


def all_commands() -> dict[str, str]:
    """Every command, and the page that has it."""
    return {command: page.name for page in PAGES for command in commands_in(page.read_text())}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the recipes and the weights that commands name, in which commands end after their parser."""

    def parse(*args: Any, **kwargs: Any) -> None:
        result = real(*args, **kwargs)
        unknown = result[1] if kwargs.get("return_unknown_args") else ()
        raise Parsed(*unknown)

    real = tyro.cli
    monkeypatch.setattr(tyro, "cli", parse)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    for name in WEIGHTS:
        (tmp_path / name).symlink_to(golden.FOLDER / "llama3")
    return tmp_path


def refusal(words: list[str], capsys: pytest.CaptureFixture[str]) -> str | None:
    """What the parser of a command says against its arguments; None if it takes them."""
    try:
        status = main(words)
    except Parsed as parsed:
        return f"unknown arguments: {parsed.args}" if parsed.args else None
    said = capsys.readouterr()
    return None if "usage: " in said.out else said.err or f"ended with {status} before its parser"


def test_the_parser_takes_every_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = all_commands()
    assert len(found) > 60
    wrong = {}
    del found[REFUSED]
    for command, page in found.items():
        words = shlex.split(" ".join(STAND_INS.get(word, word) for word in command.split()))
        place = words.index("--") if "--" in words else len(words)
        for part in (words[:place], words[place + 1 :]):  # those of `launch`, and of the command that it starts
            if part and part[0] not in WITHOUT_FLAGS and (said := refusal(part, capsys)):
                wrong[f"{page}: {command}"] = said
    assert not wrong


def test_the_message_in_limits_is_that_of_the_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = [line for language, line in fenced_lines((ROOT / "docs/limits.md").read_text()) if language == "text"]
    said = refusal(REFUSED.split(), capsys)
    assert said is not None
    assert said.split("meshpipe: ")[1].split() == " ".join(shown).removeprefix("meshpipe: ").split()
