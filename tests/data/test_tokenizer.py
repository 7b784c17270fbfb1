"""A tokenizer's folder gives its special tokens, template and files; tokens are those of its library."""

import json
from pathlib import Path

import numpy as np
import pytest
from tiny_tokenizer import make_tokenizer

from meshpipe.data.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def test_texts_become_tokens_and_back(folder: Path) -> None:
    tokenizer = Tokenizer(folder)
    texts = ["The quick brown fox", "größer 😀", ""]
    for text, tokens in zip(texts, tokenizer.encode_all(texts), strict=True):
        assert tokens.tolist() == tokenizer.encode(text)
        assert (tokens.dtype, tokens[0]) == (np.int32, tokenizer.begin)
        assert tokenizer.decode(tokens) == text
        assert tokenizer.decode(tokens, special=True) == f"<s>{text}"
        assert tokenizer.encode(text, special=False) == tokens[1:].tolist()


def test_the_files_beside_it_say_what_is_special(folder: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer(folder / "tokenizer.json")
    assert (tokenizer.begin, tokenizer.end, tokenizer.vocab_size, tokenizer.base_vocab_size) == (0, 1, 320, 320)
    assert tokenizer.special_names == {"bos_token": "<s>", "eos_token": "</s>"}
    assert (
        tokenizer.template().render([{"role": "user", "content": "a"}], prompt=True)
        == "<s><|user|>a<|end|><|assistant|>"
    )
    tokenizer.copy_to(tmp_path / "copy")
    copy = Tokenizer(tmp_path / "copy")
    assert (copy.digest, copy.special_names) == (tokenizer.digest, tokenizer.special_names)
    (tmp_path / "copy" / "tokenizer_config.json").unlink()
    (tmp_path / "copy" / "chat_template.jinja").write_text("{{ messages[0].content }}")
    alone = Tokenizer(tmp_path / "copy")
    assert (alone.begin, alone.end, alone.special_names) == (None, 1, {})
    assert alone.template().render([{"role": "user", "content": "a"}]) == "a"


def test_texts_are_neither_cut_nor_filled_even_if_the_file_says_so(folder: Path, tmp_path: Path) -> None:
    found = json.loads((folder / "tokenizer.json").read_text())
    found["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    found["padding"] = {
        "strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None,
        "pad_id": 0, "pad_type_id": 0, "pad_token": "<s>",
    }  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(found))
    changed, usual = Tokenizer(tmp_path), Tokenizer(folder)
    for text in ("a", "The quick brown fox jumps over the lazy dog."):
        assert changed.encode(text) == usual.encode(text)


def test_a_token_is_in_a_span_if_its_first_character_is(folder: Path) -> None:
    tokenizer = Tokenizer(folder)
    text = "quick 😀<|end|>fox"
    ((tokens, inside),) = tokenizer.encode_spans([text], [[(0, 1), (6, 14), (14, 15)]], special=True)
    found = [
        (tokenizer.decode([token], special=True), bool(is_in)) for token, is_in in zip(tokens, inside, strict=True)
    ]
    assert found[0] == ("<s>", False)  # added by the tokenizer
    assert ("<|end|>", True) in found
    smile = [is_in for token, is_in in zip(tokens, inside, strict=True) if tokenizer.name(int(token)) in "ðŁĺĢ"]
    assert smile
    assert all(smile)
    assert not inside[-1]  # the x of fox


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        ({}, "where there is none"),
        ({"tokenizer.model": "x"}, "SentencePiece model instead.*save_pretrained"),
        ({"tokenizer.json": "{"}, "cannot read: .*Copy it again, or update"),
        ({"tokenizer.json": '{"model": {"type": "Unknown"}}'}, "Hugging Face's format"),
    ],
)
def test_what_is_no_tokenizer_is_refused(files: dict[str, str], problem: str, tmp_path: Path) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=rf"`tokenizer` must be a tokenizer.json.*{problem}"):
        Tokenizer(tmp_path)


def test_a_damaged_config_beside_it_is_refused(folder: Path, tmp_path: Path) -> None:
    Tokenizer(folder).copy_to(tmp_path)
    for text, problem in {
        '{"bos_token": ': "JSON. Got a mistake in line 1",
        "[" * 100_000: "Got nesting too deep",
        f'{{"x": {"9" * 5000}}}': "a number with too many digits",
    }.items():
        (tmp_path / "tokenizer_config.json").write_text(text)
        with pytest.raises(ValueError, match=rf"tokenizer_config.json .*{problem}"):
            Tokenizer(tmp_path)
