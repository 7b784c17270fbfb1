"""Data that was prepared with another tokenizer than a model's is told, even if both have as many tokens."""

import json
import shutil
from pathlib import Path

import golden

from meshpipe.data import PreparedConfig
from meshpipe.data.same_tokenizer import other_tokenizer

MODEL = golden.FOLDER / "llama3"


def test_tokens_are_compared_by_their_numbers(tmp_path: Path) -> None:
    data = PreparedConfig(path=str(tmp_path))
    assert other_tokenizer(data, MODEL) == ""  # nothing tells
    (tmp_path / "tokenizer").mkdir()
    file = tmp_path / "tokenizer/tokenizer.json"
    shutil.copy(MODEL / "tokenizer.json", file)
    assert other_tokenizer(data, MODEL) == ""
    values = json.loads(file.read_text())
    file.write_text(json.dumps(values, indent=None))
    assert other_tokenizer(data, MODEL) == ""  # written otherwise, with the same tokens
    vocabulary = values["model"]["vocab"]
    first, second = (token for token, number in vocabulary.items() if number in (40, 41))
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    file.write_text(json.dumps(values))
    told = other_tokenizer(PreparedConfig(path=None, mixture=((str(tmp_path), 1.0),)), MODEL)
    assert "with 2 differences" in told
    assert f"{first!r} is {vocabulary[first]}, not {vocabulary[second]}" in told
    assert told.endswith("prepare the data with that tokenizer.")
