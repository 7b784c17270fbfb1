"""What the small files of published weights say of generating: which tokens end texts, and how tokens are drawn."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from meshpipe.documents import DamagedFileError, is_count, load_json
from meshpipe.errors import is_number
from meshpipe.models.model import ModelConfig
from meshpipe.weights.errors import WeightsError
from meshpipe.weights.fields import Fields
from meshpipe.weights.multimodal import text_fields

GENERATION_CONFIG = "generation_config.json"
_CONFIG = "config.json"
_LIMIT = 1 << 31
"""Tokens must be below this."""
_NONE = -1
"""What some files have as the token that fills texts up, where there is none."""
_DRAWN_BY_DEFAULT = {"temperature": 1.0, "top_k": 50, "top_p": 1.0}
"""What transformers takes where a file says that tokens are drawn, but not how."""


@dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """What generation_config.json and config.json say; of both, the first that names an end counts."""

    named_ends: tuple[int, ...] = ()
    wrong_end: str = ""
    """What is wrong with the file or field that names the end, as a sentence."""
    wrong_others: tuple[str, ...] = ()
    """What is wrong with fields that nothing here reads, a sentence each."""
    drawn: Mapping[str, float] = field(default_factory=dict)
    """How generation_config.json draws tokens, by field of `SamplingConfig`; none where it takes the most likely."""

    @classmethod
    def of(cls, folder: Path, model: ModelConfig) -> "GenerationSettings":
        """Those of a folder, which may lack both files. Raises nothing: see `ends`."""
        vocab = model.limits().get(model.input)
        ends: tuple[int, ...] = ()
        problems: list[str] = []
        others: list[str] = []
        drawn: Mapping[str, float] = {}
        for name in (GENERATION_CONFIG, _CONFIG):
            try:
                fields = _fields(folder / name)
            except FileNotFoundError:
                continue
            except (OSError, WeightsError) as error:
                (others if ends else problems).append(f"{name} must be a JSON object. Got {folder / name}: it {error}.")
                continue
            found, problem = _ends(fields, vocab)
            if problem:
                (others if ends else problems).append(problem)
            ends = ends or found
            others += _wrong_others(fields, vocab)
            drawn = _drawn(fields) if name == GENERATION_CONFIG else drawn
        wrong = problems[0] if problems else ""
        return cls(named_ends=ends, wrong_end=wrong, wrong_others=(*problems[1:], *others), drawn=drawn)

    @property
    def ends(self) -> tuple[int, ...]:
        """The tokens that end a text. Raises `WeightsError` where the file or field that names them is wrong."""
        if self.wrong_end:
            raise WeightsError(f"{self.wrong_end} Correct it, or remove it.")
        return self.named_ends

    def notes(self, ending: str, *, of_ends: bool = True) -> str:
        """A sentence about each wrong field that is not used, followed by an `ending` sentence; empty for none."""
        wrong = [self.wrong_end] if of_ends and self.wrong_end else []
        return " ".join(f"{said} {ending}" for said in (*wrong, *self.wrong_others))


def _fields(file: Path) -> Fields:
    values = load_json(file.resolve(), 1 << 24)
    if not isinstance(values, dict):
        raise DamagedFileError(f"holds {values!r:.60}")
    fields = Fields(values, str(file))
    return fields if file.name == GENERATION_CONFIG else text_fields(fields)


def _ends(fields: Fields, vocab: int | None) -> tuple[tuple[int, ...], str]:
    """The tokens that end texts, and what is wrong with the field."""
    value = fields.values.get("eos_token_id")
    tokens = value if isinstance(value, list) else [] if value is None else [value]
    if all(_is_token(token, vocab) for token in tokens):
        return tuple(tokens), ""
    return (), _wrong(fields, "eos_token_id", f"{_tokens_of(vocab)}, or a list of such")


def _wrong_others(fields: Fields, vocab: int | None) -> list[str]:
    return [
        _wrong(fields, name, _tokens_of(vocab))
        for name in ("bos_token_id", "pad_token_id")
        if (value := fields.values.get(name)) is not None and not _is_token(value, vocab)
        if (name, value) != ("pad_token_id", _NONE)
    ]


def _is_token(value: Any, vocab: int | None) -> bool:
    return is_count(value, _LIMIT if vocab is None else vocab)


def _tokens_of(vocab: int | None) -> str:
    return "a token" if vocab is None else f"a token of the model, 0 to {vocab - 1}"


def _wrong(fields: Fields, name: str, rule: str) -> str:
    return f"{name} must be {rule}. Got {repr(fields.values[name])[:80]} in {fields.place}."


def _drawn(fields: Fields) -> Mapping[str, float]:
    if fields.values.get("do_sample") is not True:
        return {}
    values = {name: fields.values.get(name, default) for name, default in _DRAWN_BY_DEFAULT.items()}
    return {name: value for name, value in values.items() if is_number(value)}
