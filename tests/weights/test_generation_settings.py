"""Wrong fields and files about generating in a folder of weights are refused where they are used, and else said."""

import json
import shutil
from pathlib import Path

import golden
import jax
import pytest

from meshpipe.cli import main
from meshpipe.data.tokenizer import Tokenizer
from meshpipe.errors import ArgumentError
from meshpipe.weights.errors import WeightsError
from meshpipe.weights.generation_settings import GenerationSettings

MODEL, QWEN = golden.CONFIGS["qwen2"], golden.FOLDER / "qwen2"
TOO_DEEP = '{"eos_token_id": ' + "[" * 5000


@pytest.fixture(scope="module", autouse=True)
def devices() -> None:
    """All devices of the tests, before a command takes fewer."""
    assert len(jax.devices()) >= 4


def settings(folder: Path, generation: str | None, config: str = "{}") -> GenerationSettings:
    for name, text in (("generation_config.json", generation), ("config.json", config)):
        if text is not None:
            (folder / name).write_text(text)
    return GenerationSettings.of(folder, MODEL)


@pytest.mark.parametrize("value", ["288", "-1", '"two"', "[[0]]", "true", "1.0", "[0, null]", "{}"])
def test_an_end_that_is_no_token(value: str, tmp_path: Path) -> None:
    wrong = settings(tmp_path, f'{{"eos_token_id": {value}}}')
    with pytest.raises(WeightsError, match=r"eos_token_id must be a token of the model, 0 to 287.*generation_config"):
        _ = wrong.ends
    assert wrong.notes("Unused.").endswith("generation_config.json. Unused.")
    of_config = settings(tmp_path, "{}", f'{{"eos_token_id": {value}}}')
    with pytest.raises(WeightsError, match=r"in .*/config\.json\. Correct it, or remove it\.$"):
        _ = of_config.ends


@pytest.mark.parametrize("text", ["", "{", "[]", TOO_DEEP, '{"eos_token_id": 1, "eos_token_id": 2}'])
def test_a_file_that_is_damaged(text: str, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"generation_config.json must be a JSON object. Got .* Correct it, or"):
        _ = settings(tmp_path, text).ends


def test_the_first_file_that_names_an_end_counts(tmp_path: Path) -> None:
    found = settings(tmp_path, '{"eos_token_id": [3, 4]}', '{"eos_token_id": 999, "pad_token_id": -1}')
    assert found.ends == (3, 4)
    assert "999" in found.notes("Unused.")
    assert settings(tmp_path, '{"eos_token_id": null}', '{"eos_token_id": 5}').ends == (5,)
    assert "bos_token_id must be" in settings(tmp_path, '{"bos_token_id": 288}').notes("")


def test_how_tokens_are_drawn(tmp_path: Path) -> None:
    drawn = settings(tmp_path, '{"do_sample": true, "temperature": 0.6, "top_p": 0.9}').drawn
    assert drawn == {"temperature": 0.6, "top_k": 50, "top_p": 0.9}
    assert not settings(tmp_path, '{"temperature": 0.6}').drawn


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("generation_config.json", '{"eos_token_id": 999}', "eos_token_id must be a token of the model"),
        ("generation_config.json", "{", "generation_config.json must be a JSON object"),
        ("tokenizer_config.json", "[]", "must hold a JSON object"),
    ],
)
def test_generate_refuses_and_import_says_it(
    name: str, text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tokenizers")
    folder = tmp_path / "weights"
    shutil.copytree(QWEN, folder)
    (folder / name).write_text(text)
    assert main(["generate", str(folder), "--prompt", "a"]) == 2
    assert message in capsys.readouterr().err
    if name == "generation_config.json":
        assert main(["weights", "import", str(folder), "--to", str(tmp_path / "new")]) == 0
        out = capsys.readouterr().out
        assert message in out
        assert "It is copied as it is." in out


def test_special_tokens_that_the_tokenizer_does_not_know(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    shutil.copy(QWEN / "tokenizer.json", tmp_path)
    shutil.copy(QWEN / "chat_template.jinja", tmp_path)

    def with_config(**values: object) -> Tokenizer:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(values))
        return Tokenizer(tmp_path)

    assert with_config(eos_token=None).end == 0
    with pytest.raises(ArgumentError, match=r"eos_token must be the name of a token of tokenizer\.json\. Got 7"):
        _ = with_config(eos_token=7).end
    with pytest.raises(ArgumentError, match="bos_token must be the name"):
        with_config(bos_token={"content": "<none>"}).template()
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(ArgumentError, match=r"chat_template must be a text\. Got 5"):
        with_config(chat_template=5).template()
