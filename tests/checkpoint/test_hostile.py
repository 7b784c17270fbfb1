"""Forged checkpoints: each reader ends with one sentence and the right exit code, soon, and in bounded memory."""

import json
import os
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import jax.numpy as jnp
import pytest
from damage import remake_checksums

from meshpipe.checkpoint import Checkpointer, CheckpointError, describe_checkpoint, list_checkpoints, verify_checkpoint

ROOT = Path(__file__).resolve().parents[2]
TREE = [{"params": {"layers/0/x": jnp.arange(16.0).reshape(8, 2)}}]
X = "params.layers.0.x"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    with Checkpointer(folder, keep=0) as checkpointer:
        for step in (100, 200):
            checkpointer.save(step, TREE, {"seed": 5})
    return folder


@pytest.fixture
def run(original, tmp_path):
    return Path(shutil.copytree(original, tmp_path / "run"))


def special(path, kind):
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "zeros without end":
        path.symlink_to("/dev/zero")
    elif kind == "link":
        path.symlink_to(path.parent / "nowhere")
    elif kind == "folder":
        path.mkdir()
    else:
        path.touch()
        os.truncate(path, 2 << 30)


@pytest.mark.parametrize("kind", ["pipe", "zeros without end", "link", "folder", "2 GB of nothing"])
@pytest.mark.parametrize("name", ["checksums.json", "meta/metadata", f"stage_0/{X}/.zarray", f"stage_0/{X}/0.0"])
def test_what_is_no_file_or_far_too_large_is_told_at_once(run, kind, name):
    special(run / "200" / name, kind)
    (first, *_) = verify_checkpoint(run, 200)
    assert name in first or name.startswith("checksums")
    with pytest.raises(CheckpointError, match=r"Step 200 in .* is damaged: .*The newest good step is 100\."):
        Checkpointer(run).restore(200, TREE)
    assert list_checkpoints(run) == [100, 200]


LISTS = {
    "infinity": lambda text: text.replace(b'": [', b'": [Infinity, ', 1),
    "a size that is no number": lambda text: text.replace(b'": [', b'": ["4", ', 1),
    "100,000 levels": lambda text: b"[" * 100_000,
    "100,000 levels inside": lambda text: text.replace(b"{", b'{"a": ' + b"[" * 100_000, 1),
    "5000 digits": lambda text: text.replace(b'": [', b'": [' + b"9" * 5000, 1),
    "a list": lambda text: b"[1, 2]",
    "no text": lambda text: b"\xff\xfe",
    "empty": lambda text: b"",
}


@pytest.mark.parametrize("forge", LISTS.values(), ids=LISTS)
def test_a_forged_list_is_told_in_one_sentence(run, forge):
    path = run / "200" / "checksums.json"
    path.write_bytes(forge(path.read_bytes()))
    (problem,) = verify_checkpoint(run, 200)
    assert problem.startswith("checksums.json ")
    assert len(problem) < 300
    with pytest.raises(CheckpointError, match=r"checksums\.json"):
        describe_checkpoint(run, 200)


def leaf(document):
    return document["leaves"]["params/layers/0/x"]


DOCUMENTS = {
    "a step of 10^9": lambda d: d.update(step=10**9),
    "half a step": lambda d: d.update(step=200.0),
    "a step of infinity": lambda d: d.update(step=float("inf")),
    "not a number in the metadata": lambda d: d["user"].update(loss=float("nan")),
    "200 levels of metadata": lambda d: d["user"].update(a=json.loads("[" * 200 + "]" * 200)),
    "an item elsewhere": lambda d: leaf(d).update(item="../../secret"),
    "an item that is not there": lambda d: leaf(d).update(item="stage_7"),
    "a shape of 10^12": lambda d: leaf(d).update(shape=[10**12, 2], chunks=[1, 2]),
    "a shape that overflows": lambda d: leaf(d).update(shape=[2**40, 2**40], chunks=[2**40, 2**40]),
    "a true shape": lambda d: leaf(d).update(shape=[True, 2]),
    "half a shape": lambda d: leaf(d).update(shape=[1.5, 2]),
    "a dtype of objects": lambda d: leaf(d).update(dtype="O"),
    "a dtype of dates": lambda d: leaf(d).update(dtype="datetime64[s]"),
    "a dtype that is none": lambda d: leaf(d).update(dtype="i4,("),
    "a wider dtype": lambda d: leaf(d).update(dtype="float64"),
    "a leaf that is none": lambda d: d["leaves"].update(a=[]),
    "a leaf with an endless name": lambda d: d["leaves"].update({"x" * 300: leaf(d)}),
    "a leaf with a NUL": lambda d: d["leaves"].update({"a\0": leaf(d)}),
    "a leaf without files": lambda d: d["leaves"].update({"a": leaf(d)}),
}


@pytest.mark.parametrize("forge", DOCUMENTS.values(), ids=DOCUMENTS)
def test_a_forged_document_with_right_checksums_is_refused(run, forge):
    path = run / "200" / "meta" / "metadata"
    document = json.loads(path.read_text())
    forge(document)
    path.write_text(json.dumps(document))
    remake_checksums(run / "200")
    (problem,) = verify_checkpoint(run, 200)
    assert len(problem) < 400
    for action in (lambda r: r.restore(200, TREE), lambda r: r.metadata(200), lambda r: r.leaves(200)):
        with pytest.raises(CheckpointError, match=r"Read it with the version that saved it|holds step"):
            action(Checkpointer(run))
    assert verify_checkpoint(run, 100) == []


DESCRIPTIONS = {
    "another shape": {"shape": [4, 4]},
    "another dtype": {"dtype": "<f8"},
    "objects": {"dtype": "|O"},
    "chunks of nothing": {"chunks": [0, 2]},
    "smaller chunks": {"chunks": [4, 2]},
    "compressed": {"compressor": {"id": "blosc"}},
    "filtered": {"filters": [{"id": "delta"}]},
    "columns first": {"order": "F"},
    "other names": {"dimension_separator": "/"},
    "a newer format": {"zarr_format": 3},
}


@pytest.mark.parametrize("change", DESCRIPTIONS.values(), ids=DESCRIPTIONS)
def test_a_forged_description_of_an_array_is_refused(run, change):
    path = run / "200" / "stage_0" / X / ".zarray"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    remake_checksums(run / "200")
    with pytest.raises(CheckpointError, match=r"\.zarray does not describe the leaf.*newest good step is 100"):
        Checkpointer(run).restore(200, TREE)


@pytest.mark.parametrize("text", ["", "[" * 100_000, "NaN", "{}", "[]", " " * (1 << 17)])
def test_a_description_that_is_none_is_refused(run, text):
    (run / "200" / "stage_0" / X / ".zarray").write_text(text)
    remake_checksums(run / "200")
    with pytest.raises(CheckpointError, match=r"\.zarray"):
        Checkpointer(run).restore(200, TREE)


def test_names_that_lead_elsewhere_are_not_opened(run, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("secret")
    os.mkfifo(tmp_path / "pipe")
    write_list_over(run / "200", {"../../secret": (6, 1), str(secret): (6, 1), "../../pipe": (0, 0), "a\0": (0, 0)})
    problems = verify_checkpoint(run, 200)
    assert problems
    assert all("secret" not in problem or "is missing" in problem for problem in problems)


def test_names_do_not_reach_the_terminal_as_they_are(run):
    (run / "200" / "\x1b[2J").write_text("")
    assert verify_checkpoint(run, 200) == [r"'\x1b[2J' is not part of the checkpoint"]


def write_list_over(step, files):
    path = step / "checksums.json"
    merged = json.loads(path.read_text())["files"] | {name: list(entry) for name, entry in files.items()}
    crc = zlib.crc32(json.dumps(merged, sort_keys=True).encode())
    path.write_text(json.dumps({"files": merged, "crc32": crc}))


FORGERIES = 240
BATCH = 80


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, FORGERIES, BATCH))
def test_forged_documents(forged_run, first):
    ended = subprocess.run(
        [
            sys.executable,
            str(Path(__file__).parent / "read_forged.py"),
            forged_run,
            "6",
            str(first),
            str(first + BATCH),
        ],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=600,
    )
    lines = [json.loads(line) for line in ended.stdout.splitlines()]
    assert ended.returncode == 0, (ended.stderr[-3000:], lines[-1:])
    assert len(lines) == BATCH
    assert lines[-1]["kB"] - lines[0]["kB"] < 300_000, "memory grows"
    refused = 0
    for line in lines:
        for reader, (code, text) in line["found"].items():
            assert code in (0, 1, 2), line
            assert "Traceback" not in text, line
            assert len(text.splitlines()) <= (2 if reader == "verify" else 1), line
            assert all(c.isprintable() or c == "\n" for c in text), line
            assert len(text) < 1000, line
            refused += code > 0
            if code == 0 and reader in ("restore", "resume"):
                assert text == "", line
    assert refused > BATCH


@pytest.fixture(scope="module")
def forged_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    flags = ["--steps", "6", "--checkpoint-every", "3", "--checkpoint-dir", str(folder / "run")]
    recipe = f"{ROOT / 'tests' / 'tiny_recipes.py'}:single"
    command = [sys.executable, "-m", "meshpipe", "train", recipe, *flags]
    subprocess.run(command, check=True, env=environment(), timeout=120, capture_output=True)
    return str(folder / "run")


def environment():
    path = os.pathsep.join(map(str, (ROOT, ROOT / "tests", Path(__file__).parent)))
    return {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": path}
