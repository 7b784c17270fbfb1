"""Prepared folders: the same on every run, also after a kill; every document once; bad lines by file and line."""

import gzip
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_tokenizer import TEXT, make_tokenizer

from meshpipe.data import PreparedConfig, PreparedWindows
from meshpipe.data.preparation import PrepareConfig, Prepared, job, part, prepare
from meshpipe.data.tokenizer import Tokenizer

WORDS = " ".join(TEXT).split()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def sentences(count: int, seed: int = 0, longest: int = 40) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(1, longest))) for _ in range(count)]


def write_lines(file: Path, values: list[Any]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{json.dumps(value)}\n" for value in values))
    return file


def write_parquet(file: Path, rows: list[dict], row_group_size: int = 50) -> Path:
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.Table.from_pylist(rows), file, row_group_size=row_group_size)
    return file


def made(sources: list[Path], tokenizer: Path, to: Path, **changes: Any) -> Prepared:
    settings: dict[str, Any] = {"sequence_length": 32, "held_out": 0.1} | changes
    names = tuple(str(source) for source in sources)
    return prepare(PrepareConfig(sources=names, tokenizer=str(tokenizer), to=str(to), **settings), lambda text: None)


def documents(folder: Path, split: str) -> Iterator[list[tuple[int, int]]]:
    """The pairs of each segment."""
    windows = PreparedWindows(folder, split)
    for index in range(len(windows)):
        example = windows[index]
        pairs = list(zip(example["inputs"].tolist(), example["targets"].tolist(), strict=True))
        for segment in range(int(example["segment_ids"].max()) + 1):
            (places,) = np.nonzero(example["segment_ids"] == segment)
            if example["weights"][places].any() or example["inputs"][places].any():
                yield [pairs[place] for place in places]


def texts(folder: Path, split: str) -> Counter[str]:
    tokenizer = Tokenizer(folder / "tokenizer")
    return Counter(
        tokenizer.decode([pairs[0][0], *(b for _, b in pairs)], special=True) for pairs in documents(folder, split)
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def test_every_document_is_on_one_side_and_all_kinds_of_files_give_the_same(tokenizer: Path, tmp_path: Path) -> None:
    lines = sentences(300)
    rows = [{"text": line, "id": number} for number, line in enumerate(lines)]
    sources = {
        "jsonl": write_lines(tmp_path / "a.jsonl", rows),
        "parquet": write_parquet(tmp_path / "a.parquet", rows),
        "gz": tmp_path / "a.jsonl.gz",
        "text": tmp_path / "a.txt",
    }
    sources["gz"].write_bytes(gzip.compress(sources["jsonl"].read_bytes()))
    sources["text"].write_text("|||".join(lines))
    expected = Counter(f"<s>{line}</s>" for line in lines)
    eval_texts = []
    for kind, source in sources.items():
        settings = {"sequence_length": 400, "packing": "whole", "separator": "|||" if kind == "text" else None}
        to = made([source], tokenizer, tmp_path / kind, **settings).folder
        train, held_out = texts(to, "train"), texts(to, "eval")
        assert train + held_out == expected
        assert not train.keys() & held_out.keys()  # equal documents are on one side
        eval_texts.append(held_out)
    assert 10 < eval_texts[0].total() < 60
    assert all(one == eval_texts[0] for one in eval_texts)


def test_the_same_sources_give_the_same_files_and_nothing_is_made_twice(tokenizer: Path, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", [{"text": line} for line in sentences(100)])
    first = made([source], tokenizer, tmp_path / "one")
    again = made([source], tokenizer, tmp_path / "one")
    assert (first.made, again.made, again.manifest) == (1, 0, first.manifest)
    moved = tmp_path / "elsewhere.jsonl"
    shutil.copy(source, moved)
    other = made([moved], tokenizer, tmp_path / "two")
    assert other.manifest.fingerprint == first.manifest.fingerprint
    names = [file.name for split in ("train", "eval") for file in first.manifest.files[split]]
    assert len(names) == 2
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    longer = made([source], tokenizer, tmp_path / "three", sequence_length=33)
    assert longer.manifest.fingerprint != first.manifest.fingerprint
    with pytest.raises(ValueError, match=r"prepared otherwise. Name another folder, or replace it with `overwrite`"):
        made([source], tokenizer, tmp_path / "one", sequence_length=33)
    replaced = made([source], tokenizer, tmp_path / "one", sequence_length=33, overwrite=True)
    assert replaced.manifest.fingerprint == longer.manifest.fingerprint


def test_a_stopped_preparation_continues_with_its_part(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = [
        write_lines(tmp_path / f"{name}.jsonl", [{"text": line} for line in sentences(60, seed, 40)])
        for seed, name in enumerate("abc")
    ]
    monkeypatch.setattr(job, "MEBI", 8_000)
    monkeypatch.setattr(part, "BATCH_DOCUMENTS", 10)
    settings: dict[str, Any] = {"part_size": 1, "sequence_length": 64}
    whole = made(sources, tokenizer, tmp_path / "whole", **settings)
    assert (whole.parts, whole.made) == (3, 3)

    calls, tokenize = [], part.tokenize

    def stopped(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 9:  # in the second part
            raise KeyboardInterrupt
        return tokenize(*arguments)

    to = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        patch.setattr(part, "tokenize", stopped)
        with pytest.raises(KeyboardInterrupt):
            made(sources, tokenizer, to, **settings)
    with pytest.raises(ValueError, match="it was not finished: run the same command again"):
        PreparedConfig(path=str(to)).train_source()
    (to / "train-00001.array_record").write_bytes(b"half")  # as when it ends between a file and what is known of it
    done = made(sources, tokenizer, to, **settings)
    assert 0 < done.made < 3
    assert contents(to) == contents(tmp_path / "whole") | {"prepared.json": (to / "prepared.json").read_bytes()}
    assert done.manifest == whole.manifest


def test_parts_of_other_sources_or_settings_are_made_again(tokenizer: Path, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", [{"text": line} for line in sentences(100)])
    bad = write_lines(tmp_path / "b.jsonl", [{"text": "a b c"}, {"other": 3}])
    to = tmp_path / "to"
    with pytest.raises(ValueError, match=r"b.jsonl, line 2: it has no field 'text'"):
        made([source, bad], tokenizer, to)
    assert not to.exists()  # nothing of it is whole
    write_lines(bad, [{"text": "a b c"}, {"text": "3"}])
    assert made([source, bad], tokenizer, to).manifest.counts["train"].texts > 80


@pytest.mark.parametrize("packing", ["cut", "whole"])
def test_windows_are_full_and_packed_as_asked(packing: str, tokenizer: Path, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", [{"text": line} for line in sentences(400, longest=10)])
    done = made([source], tokenizer, tmp_path / packing, packing=packing)
    counts = done.manifest.counts["train"]
    assert counts.targets == counts.pairs
    assert counts.pairs / (32 * counts.windows) > 0.95
    begins = [pairs[0][0] for pairs in documents(done.folder, "train")]
    ends = [pairs[-1][1] for pairs in documents(done.folder, "train")]
    whole = sum(begin == 0 and end == 1 for begin, end in zip(begins, ends, strict=True))
    assert begins.count(0) == ends.count(1) == counts.texts
    if packing == "whole":
        assert whole > 0.95 * counts.texts  # the others are longer than a window
    else:
        assert whole < 0.8 * counts.texts


def test_only_answers_are_learned_of_conversations_and_prompts(tokenizer: Path, tmp_path: Path) -> None:
    chats = [
        {"messages": [{"role": "user", "content": f"What is {n}?"}, {"role": "assistant", "content": f"It is {n}."}]}
        for n in range(60)
    ]
    pairs = [{"question": f"What is {n}? ", "answer": f"It is {n}."} for n in range(60)]
    cases: dict[Path, tuple[dict, str]] = {
        write_lines(tmp_path / "chats.jsonl", chats): ({}, "<|end|>"),
        write_parquet(tmp_path / "chats.parquet", chats): ({}, "<|end|>"),
        write_lines(tmp_path / "pairs.jsonl", pairs): ({"text_field": "answer", "prompt_field": "question"}, "</s>"),
    }
    for source, (settings, end) in cases.items():
        done = made([source], tokenizer, tmp_path / f"to-{source.name}", **settings)
        library, learned = Tokenizer(tokenizer), []
        for split in ("train", "eval"):
            windows = PreparedWindows(done.folder, split)
            for index in range(len(windows)):
                example = windows[index]
                counted = example["targets"][example["weights"] > 0]
                learned += library.decode(counted, special=True).split(end)[:-1]
        assert sorted(learned) == sorted(f"It is {n}." for n in range(60))
        assert done.manifest.settings["packing"] == "whole"
        assert done.manifest.counts["train"].targets < 0.6 * done.manifest.counts["train"].pairs


def test_a_conversation_longer_than_a_window_is_cut_and_pieces_without_an_answer_are_left_out(
    tokenizer: Path, tmp_path: Path
) -> None:
    chat = [{"role": "user", "content": "What is it? " * 40}, {"role": "assistant", "content": "It is four."}]
    lines = [{"messages": chat}, *({"messages": [chat[0] | {"content": f"{n}"}, chat[1]]} for n in range(40))]
    done = made([write_lines(tmp_path / "a.jsonl", lines)], tokenizer, tmp_path / "to", held_out=0.2)
    assert done.manifest.noticed["texts longer than a window were cut"] == 1
    total = sum(done.manifest.counts[split].texts for split in ("train", "eval"))
    assert total == 41
    assert all(len(pairs) <= 32 for split in ("train", "eval") for pairs in documents(done.folder, split))


def test_a_text_file_is_one_document_in_pieces_that_end_at_lines(tokenizer: Path, tmp_path: Path) -> None:
    lines = sentences(6000, longest=12)
    source = tmp_path / "book.txt"
    source.write_text("\n".join(lines), encoding="utf-8-sig")
    done = made([source], tokenizer, tmp_path / "to", sequence_length=100_000, packing="whole")
    pieces = texts(done.folder, "train") + texts(done.folder, "eval")
    assert sum(piece.startswith("<s>") for piece in pieces) == sum(piece.endswith("</s>") for piece in pieces) == 1
    assert all(piece.endswith(("\n", "</s>")) for piece in pieces)
    # The first token of a piece is no target, but an input.
    found = sorted(line for piece in pieces for line in piece.removeprefix("<s>").removesuffix("</s>").splitlines())
    assert found == sorted(lines)
    assert done.manifest.counts["eval"].texts >= 1


def test_sources_of_their_own_are_held_out(tokenizer: Path, tmp_path: Path) -> None:
    train = write_lines(tmp_path / "train.jsonl", [{"text": line} for line in sentences(50)])
    other = write_lines(tmp_path / "eval.jsonl", [{"text": line} for line in sentences(20, seed=1)])
    done = made([train], tokenizer, tmp_path / "to", eval_sources=(str(other),), sequence_length=500, packing="whole")
    assert texts(done.folder, "train") == Counter(f"<s>{line}</s>" for line in sentences(50))
    assert texts(done.folder, "eval") == Counter(f"<s>{line}</s>" for line in sentences(20, seed=1))
    assert done.manifest.sources[1]["texts"] == 20


def test_large_files_are_cut_between_documents(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "MEBI", 20_000)
    lines = sentences(600)
    for kind, source in {
        "jsonl": write_lines(tmp_path / "a.jsonl", [{"text": line} for line in lines]),
        "parquet": write_parquet(tmp_path / "a.parquet", [{"text": line} for line in lines], 50),
        "text": tmp_path / "a.txt",
    }.items():
        if kind == "text":
            source.write_text("\n\n\n".join(lines))
        settings = {"part_size": 1, "separator": r"\n\n\n" if kind == "text" else None, "held_out": 0.0}
        done = made([source], tokenizer, tmp_path / kind, sequence_length=300, packing="whole", **settings)
        assert done.parts > 1
        assert done.manifest.counts["train"].texts == len(lines)
        assert done.manifest.counts["eval"].windows == 0
        if kind == "text":
            assert texts(done.folder, "train") == Counter(f"<s>{line}</s>" for line in lines)


def test_a_folder_is_read_in_the_order_of_its_names(tokenizer: Path, tmp_path: Path) -> None:
    for number in (2, 0, 1):
        write_lines(tmp_path / "in" / f"{number}.jsonl", [{"text": line} for line in sentences(20, seed=number)])
    (tmp_path / "in" / "README.md").write_text("about the data")
    (tmp_path / "in" / ".hidden.jsonl").write_text("no")
    said: list[str] = []
    to = tmp_path / "to"
    config = PrepareConfig(
        sources=(str(tmp_path / "in"),), tokenizer=str(tokenizer), to=str(to), sequence_length=32, held_out=0.2
    )
    done = prepare(config, said.append)
    assert [Path(source["path"]).name for source in done.manifest.sources] == ["0.jsonl", "1.jsonl", "2.jsonl"]
    assert said == [f"Not read, being empty or of another kind: {tmp_path / 'in' / 'README.md'}."]


def test_a_folder_may_be_prepared_inside_its_source(tokenizer: Path, tmp_path: Path) -> None:
    source = tmp_path / "in"
    for number in range(3):
        write_lines(source / f"{number}.txt", sentences(20, seed=number))
    first, again = (made([source], tokenizer, source / "prepared", held_out=0.0).manifest for _ in range(2))
    assert first == again
    assert [Path(one["path"]).name for one in again.sources] == ["0.txt", "1.txt", "2.txt"]


def test_packed_json_is_json(tokenizer: Path, tmp_path: Path) -> None:
    """Large sets of web pages are in files of JSON lines that are named `.json.gz`."""
    lines = b"".join(f"{json.dumps({'text': text})}\n".encode() for text in sentences(60))
    source = tmp_path / "a.json.gz"
    source.write_bytes(gzip.compress(lines))
    assert made([source], tokenizer, tmp_path / "to").manifest.counts["train"].texts > 30


BAD: dict[str, tuple[bytes, str]] = {
    "empty": (b"\n", "it is empty"),
    "not JSON": (b'{"text": "a\n', "it is not JSON: Unterminated string.* at character 10"),
    "a number": (b"3\n", "it must be a JSON object. Got 3"),
    "no field": (b'{"body": "a"}\n', "it has no field 'text'; it has the fields 'body'"),
    "no text": (b'{"text": 3}\n', "its field 'text' must be a text. Got int"),
    "not UTF-8": (b'{"text": "\xff"}\n', "it is not UTF-8, at byte 11 of the line"),
    "half a character": (b'{"text": "\\ud83d"}\n', "its text has half of a surrogate pair"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_lines_are_reported_and_left_out_if_that_is_allowed(name: str, tokenizer: Path, tmp_path: Path) -> None:
    line, problem = BAD[name]
    source = tmp_path / "a.jsonl"
    good = b"".join(f"{json.dumps({'text': text})}\n".encode() for text in sentences(60))
    source.write_bytes(good + line + good + line)
    with pytest.raises(ValueError, match=rf"a.jsonl, line 61: {problem}.*leave such lines out with `skip_bad_lines`"):
        made([source], tokenizer, tmp_path / "to")
    assert not (tmp_path / "to").exists()
    said: list[str] = []
    settings: dict[str, Any] = {"sequence_length": 32, "held_out": 0.1}
    names = (str(source),)
    for allowed in (1, 2):
        config = PrepareConfig(
            sources=names, tokenizer=str(tokenizer), to=str(tmp_path / "to"), skip_bad_lines=allowed, **settings
        )
        if allowed == 1:
            with pytest.raises(ValueError, match=r"line 122: .*It is one more than the 1 of `skip_bad_lines`"):
                prepare(config, said.append)
        else:
            manifest = prepare(config, said.append).manifest
    assert manifest.bad == 2
    assert [line.partition(", ")[2].partition(":")[0] for line in manifest.bad_lines] == ["line 61", "line 122"]
    assert said[-1].endswith("It is left out.")


def test_the_line_of_a_later_part_is_counted_from_the_begin_of_its_file(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [{"text": line} for line in sentences(150)]
    source = write_lines(tmp_path / "a.jsonl", [*lines, {"text": 3}, *lines[:5]])
    monkeypatch.setattr(job, "MEBI", 10_000)
    assert source.stat().st_size > 10_000
    with pytest.raises(ValueError, match=r"a.jsonl, line 151: its field 'text' must be a text"):
        made([source], tokenizer, tmp_path / "to", part_size=1)


def test_empty_texts_are_counted(tokenizer: Path, tmp_path: Path) -> None:
    rows = [{"text": line} for line in sentences(50)] + [{"text": ""}, {"text": None}]
    manifest = made([write_parquet(tmp_path / "a.parquet", rows)], tokenizer, tmp_path / "to").manifest
    assert manifest.noticed["empty texts left out"] == 2


@pytest.mark.slow
def test_a_preparation_that_is_killed_continues(tokenizer: Path, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", [{"text": line} for line in sentences(60_000, longest=40)])
    arguments = ["data", "prepare", str(source), "--tokenizer", str(tokenizer), "--sequence-length", "64"]
    command = [sys.executable, "-m", "meshpipe", *arguments, "--part-size", "1", "--to"]
    subprocess.run([*command, str(tmp_path / "whole")], check=True, timeout=300, capture_output=True)
    to, kills = tmp_path / "killed", 0
    while True:
        process = subprocess.Popen([*command, str(to)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        before, until = _finished(to), time.monotonic() + 120
        while process.poll() is None and _finished(to) == before and time.monotonic() < until:
            time.sleep(0.02)
        if kills == 2 or process.poll() is not None:
            break
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        kills += 1
    error = process.communicate(timeout=300)[1]
    assert process.returncode == 0, error
    assert kills == 2
    assert f"Continuing: {before} of" in error, error
    assert contents(to) == contents(tmp_path / "whole")


def _finished(folder: Path) -> int:
    return len(list((folder / ".parts").glob("*.json")))


def test_two_processes_do_not_prepare_one_folder(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_lines(tmp_path / "a.jsonl", [{"text": line} for line in sentences(100)])
    tokenize: Callable[..., Any] = part.tokenize

    def meanwhile(*arguments: Any) -> Any:
        monkeypatch.setattr(part, "tokenize", tokenize)
        with pytest.raises(ValueError, match="Only one process may prepare a folder"):
            made([source], tokenizer, tmp_path / "to")
        return tokenize(*arguments)

    monkeypatch.setattr(part, "tokenize", meanwhile)
    assert made([source], tokenizer, tmp_path / "to").made == 1
