"""`meshpipe data`: what it prints and writes, and what it refuses with exit code 2 and nothing half-written."""

import gzip
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from waiting import LONG

from meshpipe.cli import main

sys.path.append(str(Path(__file__).parents[1] / "data"))
from tiny_tokenizer import make_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    file = tmp_path / "chats.jsonl"
    chat = [{"role": "user", "content": "What is 7?"}, {"role": "assistant", "content": "It is seven."}]
    file.write_text("".join(f"{json.dumps({'messages': chat, 'id': number})}\n" for number in range(20)))
    return file


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    status = main(["data", *map(str, arguments)])
    output, error = capsys.readouterr()
    return status, output, error


def test_what_is_prepared_is_shown_and_verified(
    tokenizer: Path, chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    to = tmp_path / "to"
    arguments = ("prepare", chats, "--tokenizer", tokenizer, "--to", to, "--sequence-length", "64", "--held-out", "0")
    status, output, error = run(capsys, *arguments)
    assert (status, error) == (0, "")
    assert "windows of 64 tokens from 1 file" in output
    assert f"Train on it with --data.path {to}, or PreparedConfig(path='{to}') in a recipe." in output
    assert run(capsys, *arguments)[1].splitlines()[-1].startswith("It was prepared already; nothing was written.")
    status, shown, _ = run(capsys, "show", to, "--examples", "1")
    assert status == 0
    assert output.splitlines()[:5] == shown.splitlines()[:5]
    assert "| <s><|user|>What is 7?<|end|><|assistant|>«It is seven.<|end|>»" in shown
    assert run(capsys, "verify", to)[:2] == (0, f"{to}: every byte of 1 files is good\n")
    file = to / "train-00000.array_record"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    status, output, _ = run(capsys, "verify", to)
    assert status == 1
    assert output.startswith("train-00000.array_record: its bytes are not those that were written.")
    assert run(capsys, "show", to, "--examples", "1", "--split", "eval")[0] == 2


def test_preparing_imports_nothing_that_takes_seconds(tokenizer: Path, chats: Path, tmp_path: Path) -> None:
    flags = ["--tokenizer", tokenizer, "--to", tmp_path / "to", "--sequence-length", 32, "--held-out", 0]
    command = [sys.executable, "-X", "importtime", "-m", "meshpipe", "data", "prepare", chats, *flags]
    ended = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=LONG)
    assert ended.returncode == 0, ended.stderr
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in ended.stderr.splitlines()}
    assert {"meshpipe", "tokenizers"} <= imported
    assert not imported & {"jax", "flax", "optax", "orbax", "grain", "scipy", "matplotlib", "pyarrow"}


def test_a_full_disk_is_said_and_leaves_nothing_half_written(tokenizer: Path, chats: Path, tmp_path: Path) -> None:
    flags = ["--tokenizer", tokenizer, "--to", tmp_path / "to", "--sequence-length", 32, "--held-out", 0]
    command = shlex.join(map(str, [sys.executable, "-m", "meshpipe", "data", "prepare", chats, *flags]))
    limited = f"ulimit -f 16; exec {command}"  # largest file: 16 blocks of 1 KiB
    ended = subprocess.run(["bash", "-c", limited], capture_output=True, text=True, timeout=LONG)
    assert ended.returncode == 2, ended.stderr
    assert "--to must be a folder with room for the data" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert not (tmp_path / "to").exists()


WRONG: dict[str, tuple[str, str]] = {
    "no source": ("", "There must be at least one source"),
    "no such source": ("missing.txt", "must be files or folders. Got 'missing.txt', which is neither"),
    "an empty file": ("empty.txt", "must have text. Got 'empty.txt', which is empty"),
    "an empty folder": ("nothing", "must have files of text, JSON lines or Parquet. Got the folder 'nothing'"),
    "a folder of nothing to read": ("packed", "Got the folder 'packed', which has none; 'b.jsonl.zst' cannot be read"),
    "zstd": ("packed/b.jsonl.zst", "Unpack it: zstd -d b.jsonl.zst"),
    "a list in a file named .json": ("list.json", "begins with a list. Convert it: jq -c '.*' list.json > list.jsonl"),
    "an object of several lines": ("object.json", "Line 1: it is not JSON"),
    "only lines that are not UTF-8": ("latin.jsonl", "Line 1: it is not UTF-8, at byte 11 of the line"),
    "one text": ("one.jsonl", "Nothing would be held out: --held-out 0.1 of one text is too little"),
    "a list of JSON": ("list.jsonl", "begins with a list. Convert it: jq -c '.*' list.jsonl > list.lines.jsonl"),
    "not Parquet": ("wrong.parquet", "must be Parquet where named so"),
    "a cut Parquet file": ("cut.parquet", "must be a whole Parquet file"),
    "an archive": ("a.zip", "Unpack or convert it"),
    "bytes": ("bytes.txt", "must be text. Got 'bytes.txt', which has bytes of zero"),
    "not UTF-8": ("latin.txt", "latin.txt: it is not UTF-8 .*Convert it"),
    "damaged gzip": ("cut.jsonl.gz", "must be a file that can be read. Got 'cut.jsonl.gz': .*ended"),
    "twice": ("a.txt a.txt", "Every source must be given once"),
    "no usual field": ("other.jsonl", "It has the fields 'body'. Name the field with the text: |Name the field"),
    "no such field": ("other.jsonl --text-field content", "--text-field must be a field of other.jsonl. Got 'content'"),
    "a field of text": ("a.txt --text-field text", "--text-field is for JSON lines and Parquet"),
    "a separator of records": ("chats.jsonl --separator x", "--separator is for text. Got it with chats.jsonl"),
    "text and chat": ("chats.jsonl --text-field a --chat-field b", "Got --chat-field with --text-field"),
    "a prompt alone": ("chats.jsonl --prompt-field a", "Pass --text-field as well"),
    "empty lines": ("blank.jsonl", "blank.jsonl, line 2: it is empty"),
    "no answer": ("unanswered.jsonl", "line 1: it has no answer to learn from"),
    "no template": ("chats.jsonl --tokenizer bare", "Conversations need a chat template. Got none beside"),
    "a wrong template": ("chats.jsonl --chat-template wrong.jinja", "a mistake in line 1"),
    "a needless template": ("a.txt --chat-template wrong.jinja", "--chat-template is for conversations"),
    "no tokenizer": ("a.txt --tokenizer nothing", "--tokenizer must be a tokenizer.json"),
    "no end": ("a.txt --end-token <stop>", "--end-token must be a token of the tokenizer. Got '<stop>'"),
    "no length": ("a.txt --sequence-length 0", "--sequence-length must be at least 1"),
    "all held out": ("a.txt --held-out 1", "--held-out must be at least 0 and below 1"),
    "too little held out": ("chats.jsonl --held-out 1e-9", "Nothing would be held out: --held-out 1e-09 of 20 texts"),
    "not a date": ("chats.jsonl --date yesterday", "--date must be a date as 2026-01-31"),
    "no separator": ("a.txt --separator=", "--separator must not be empty"),
    "a folder in use": ("a.txt --to nothing/../used", "--to must be a new or empty folder"),
    "a file as folder": ("a.txt --to a.txt", "--to must name a writable folder"),
}


@pytest.fixture
def wrong_files(tokenizer: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name, content in {
        "a.txt": b"What is it?\n" * 2000,
        "empty.txt": b"",
        "list.jsonl": b'[{"text": "a"}]',
        "list.json": b'[{"text": "a"}]',
        "object.json": b'{\n "text": "a"\n}\n',
        "latin.jsonl": b'{"text": "\xe9"}\n' * 3,
        "one.jsonl": b'{"text": "a b c"}\n',
        "packed/b.jsonl.zst": b"\x28\xb5\x2f\xfd" + bytes(9),
        "wrong.parquet": b"not Parquet",
        "cut.parquet": b"PAR1 and no end",
        "a.zip": b"PK",
        "bytes.txt": b"a\0b",
        "latin.txt": "größer ".encode("latin-1") * 100,
        "other.jsonl": b'{"body": "a"}\n',
        "blank.jsonl": b'{"text": "What is it?"}\n\n{"text": "It is four."}\n',
        "unanswered.jsonl": b'{"messages": [{"role": "user", "content": "a"}]}\n',
        "wrong.jinja": b"{% for %}",
        "used/file": b"",
    }.items():
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_bytes(content)
    Path("cut.jsonl.gz").write_bytes(gzip.compress(b'{"text": "What is it?"}\n' * 1000)[:-20])
    Path("nothing").mkdir()
    Path("bare").mkdir()
    Path("bare/tokenizer.json").write_bytes((tokenizer / "tokenizer.json").read_bytes())
    return tmp_path


@pytest.mark.parametrize("name", WRONG)
def test_wrong_calls_write_nothing(
    name: str, tokenizer: Path, wrong_files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, problem = WRONG[name]
    defaults = {"--tokenizer": tokenizer, "--to": "to", "--sequence-length": 32, "--held-out": 0.1}
    words = arguments.split()
    added = [str(word) for flag in defaults.items() if flag[0] not in words for word in flag]
    before = sorted(wrong_files.rglob("*"))
    status, _, error = run(capsys, "prepare", *words, *added)
    assert status == 2, error
    text = " ".join(error.replace("│", " ").split())
    assert re.search(problem, text), text
    assert "Traceback" not in error
    assert sorted(wrong_files.rglob("*")) == before


@pytest.mark.slow
def test_a_vocabulary_that_does_not_fit_the_model_is_found_before_anything_is_compiled(
    tokenizer: Path, wrong_files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["a.txt", "--tokenizer", tokenizer, "--to", "to", "--sequence-length", 32, "--held-out", 0.1]
    status, _, error = run(capsys, "prepare", *arguments)
    assert status == 0, error
    Path("recipe.py").write_text(
        "from dataclasses import replace\n"
        "from recipes.language_model import debug\n"
        "from meshpipe.data import PreparedConfig\n"
        "def tokens():\n"
        "    return replace(debug(), data=PreparedConfig(path='to'))\n"
    )
    assert main(["train", "recipe.py:tokens", "--metrics", "m.jsonl"]) == 2
    output, error = capsys.readouterr()
    assert "prepared with a tokenizer of 320 tokens, for a model of 256" in error
    assert "--model.vocab-size" in error
    assert "Compiled" not in output
    assert not Path("m.jsonl").exists()
