"""Tokenizers in Hugging Face's format: text to tokens and back, and what their folder says about them."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np

from meshpipe.data.chat import ChatTemplate, Span, begins_inside
from meshpipe.errors import ArgumentError
from meshpipe.files import expanded

FILE = "tokenizer.json"
CONFIG = "tokenizer_config.json"
MAP = "special_tokens_map.json"
TEMPLATE = "chat_template.jinja"
FILES = (FILE, CONFIG, MAP, TEMPLATE, "generation_config.json", "added_tokens.json", "vocab.json", "merges.txt")
"""Files of a tokenizer that belong together; all but the first may be missing."""
ENDS = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "[SEP]")
"""Names of the token after a text, where no file says it."""
NONE, AUTO = "none", "auto"

Encoded = tuple[np.ndarray, np.ndarray | None]
"""Tokens int32 [tokens], and whether each is in a span, bool [tokens], if there are spans."""


class Tokenizer:
    """A `tokenizer.json`, or the one of a folder, with the files beside it that name special tokens and a template.

    Raises `ArgumentError` if there is none, it cannot be read, or the library `tokenizers` is not installed.
    """

    def __init__(self, path: str | Path) -> None:
        self.file = _find(expanded("tokenizer", path))
        self._text = _read(self.file)
        self._library = _load(self.file, self._text)
        # Files may say to cut or fill texts, for models that classify them.
        self._library.no_truncation()
        self._library.no_padding()
        self._config = _settings(self.file.with_name(CONFIG))
        self._map = _settings(self.file.with_name(MAP))

    @cached_property
    def digest(self) -> str:
        """Of the tokenizer alone, whatever lies beside it."""
        return hashlib.sha256(self._text.encode()).hexdigest()

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest token."""
        return max(self._library.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @cached_property
    def base_vocab_size(self) -> int:
        """The same without added tokens, some of which a text may never have, e.g. those for images or for padding."""
        added = set(self._library.get_added_tokens_decoder())
        return max((token for token in self._library.get_vocab().values() if token not in added), default=-1) + 1

    @cached_property
    def special_names(self) -> dict[str, str]:
        """Names of special tokens, such as `eos_token`: what templates read."""
        both = {**self._map, **self._config}
        names = {key: _name(both[key]) for key in both if key.endswith("_token")}
        return {key: name for key, name in names.items() if name is not None}

    @property
    def begin(self) -> int | None:
        """The token in front of a text; None if no file says it. Raises `ArgumentError` as `end` does."""
        return self._named("bos_token")

    @property
    def end(self) -> int | None:
        """The token after a text: what the files say, or else a usual one; None if there is none. Raises
        `ArgumentError` where the files name one that the vocabulary does not have.
        """
        found = self._named("eos_token")
        if found is not None:
            return found
        return next((token for token in map(self.token, ENDS) if token is not None), None)

    def token(self, name: str | None) -> int | None:
        """The number of a token of the vocabulary; None if there is no such token."""
        return None if name is None else self._library.token_to_id(name)

    def name(self, token: int) -> str:
        """How the vocabulary writes a token."""
        name = self._library.id_to_token(token)
        return f"<{token}>" if name is None else name

    def template(self, today: date | None = None) -> ChatTemplate | None:
        """The chat template of the folder, if it has one; `today` is the date that it may write. Raises `ArgumentError`
        for one that is none, and as `begin` and `end` do, whose names it may write.
        """
        source = self._template_source()
        if source is None:
            return None
        for key in ("bos_token", "eos_token"):
            self._named(key)
        return ChatTemplate(source, self.special_names, today)

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """The tokens of a text; with `special`, with those that the tokenizer adds, such as one at its begin.

        Raises `ArgumentError` for a text that UTF-8 cannot hold, as an argument of a command may be.
        """
        try:
            return self._library.encode(text, add_special_tokens=special).ids
        except (TypeError, UnicodeEncodeError):
            raise ArgumentError(f"A text must be one that UTF-8 can hold. Got {text!r:.100}.") from None

    def encode_all(self, texts: Sequence[str], *, special: bool = True) -> list[np.ndarray]:
        """The tokens of many texts, int32 [tokens] each, on all cores."""
        encode = getattr(self._library, "encode_batch_fast", self._library.encode_batch)  # fast: without positions
        return [np.asarray(one.ids, np.int32) for one in encode(list(texts), add_special_tokens=special)]

    def encode_spans(self, texts: Sequence[str], spans: Sequence[Sequence[Span]], *, special: bool) -> list[Encoded]:
        """As `encode_all`, with whether the first character of each token is in a span; added tokens are in none."""
        found: list[Encoded] = []
        for one, parts in zip(self._library.encode_batch(list(texts), add_special_tokens=special), spans, strict=True):
            inside = np.fromiter(begins_inside(one.offsets, parts), bool, len(one.ids))
            if special:
                inside &= np.asarray(one.special_tokens_mask) == 0
            found.append((np.asarray(one.ids, np.int32), inside))
        return found

    def decode(self, tokens: Iterable[SupportsIndex], *, special: bool = False) -> str:
        """The text of tokens; `special` keeps special tokens."""
        return self._library.decode(list(map(int, tokens)), skip_special_tokens=not special)

    def contents(self) -> dict[str, bytes]:
        """By name, the files of the tokenizer that lie beside each other."""
        beside = {name: self.file.with_name(name) for name in FILES if name != FILE}
        return {FILE: self._text.encode()} | {
            name: file.read_bytes() for name, file in beside.items() if file.is_file()
        }

    def copy_to(self, folder: Path) -> None:
        """Copies the files of the tokenizer into a folder, which is made when missing."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in self.contents().items():
            (folder / name).write_bytes(content)

    def _named(self, key: str) -> int | None:
        """The token that the files name so; None if they name none."""
        file = CONFIG if key in self._config else MAP
        given = (self._config if key in self._config else self._map).get(key)
        found = self.token(_name(given))
        if given is not None and found is None:
            raise ArgumentError(
                f"{key} must be the name of a token of {self.file.name}. Got {given!r:.80} in "
                f"{self.file.with_name(file)}. Correct it, or remove it."
            )
        return found

    def _template_source(self) -> str | None:
        file = self.file.with_name(TEMPLATE)
        if file.is_file():
            return _read(file)
        found = self._config.get("chat_template")
        if isinstance(found, list):  # several, each with a name
            named = {one.get("name"): one.get("template") for one in found if isinstance(one, Mapping)}
            found = named.get("default")
        if found is not None and not isinstance(found, str):
            raise ArgumentError(
                f"chat_template must be a text. Got {found!r:.80} in {self.file.with_name(CONFIG)}. Correct it, or "
                "remove it."
            )
        return found

    def __repr__(self) -> str:
        return f"{type(self).__name__}(vocab_size={self.vocab_size}, digest={self.digest[:12]})"


def _find(path: Path) -> Path:
    file = path / FILE if path.is_dir() else path
    if file.is_file():
        return file
    if path.is_dir() and any(path.glob("*.model")):
        raise ArgumentError(
            f"`tokenizer` must be a {FILE}, or a folder with one. Got {str(path)!r}, which has a SentencePiece model "
            "instead. Transformers converts it: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)."
        )
    raise ArgumentError(f"`tokenizer` must be a {FILE}, or a folder with one. Got {str(path)!r}, where there is none.")


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ArgumentError(f"{file} cannot be read: {error}.") from error


def _load(file: Path, text: str) -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise ArgumentError(
            f"A {FILE} is read by the library tokenizers. It is not installed. Install it: "
            "pip install 'meshpipe[tokens]'."
        ) from error
    try:
        return tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises no narrower type
        raise ArgumentError(
            f"`tokenizer` must be a {FILE} in Hugging Face's format. Got {str(file)!r}, which the library tokenizers "
            f"{tokenizers.__version__} cannot read: {error}. Copy it again, or update the library."
        ) from error


def _settings(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        found = json.loads(_read(file))
    except json.JSONDecodeError as error:
        raise ArgumentError(f"{file} must hold JSON. Got a mistake in line {error.lineno}: {error.msg}.") from error
    except (RecursionError, ValueError):  # an integer of thousands of digits is a ValueError
        raise ArgumentError(
            f"{file} must hold JSON that can be read. Got nesting too deep, or a number with too many digits."
        ) from None
    if not isinstance(found, dict):
        raise ArgumentError(f"{file} must hold a JSON object. Got {found!r:.80}. Copy it again, or remove it.")
    return found


def _name(token: Any) -> str | None:
    found = token.get("content") if isinstance(token, Mapping) else token
    return found if isinstance(found, str) else None
