"""Documents from the records of files: which field is the text, and what of it is learned."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from meshpipe.data.chat import ChatTemplate, Span, messages_of
from meshpipe.data.preparation.config import PrepareConfig
from meshpipe.data.preparation.records import Record, read_records
from meshpipe.data.preparation.sources import Slice, SourceFile, open_parquet
from meshpipe.errors import ArgumentError

TEXT_FIELDS = ("text",)
CHAT_FIELDS = ("messages", "conversations")
SEARCHED_LINES = 100
"""Of so many lines at the beginning, one must be a JSON object."""
TOOLS = "tools"
"""Field with the tools of a conversation, which templates show to the model."""


@dataclass(frozen=True)
class Document:
    """A text to be learned, or a piece of it."""

    text: str
    side: int
    """Decides whether it is held out, `side_of` its text: documents with the same are on the same side."""
    span: tuple[int, int] | None = None
    """The bytes of a file that decide it instead, for a piece of a text without separators."""
    answers: tuple[Span, ...] | None = None
    """The characters that are learned; None if all are."""
    begins: bool = True
    """Whether it is the first piece of a document."""
    ends: bool = True
    """Whether it is the last piece of a document."""
    special: bool = True
    """Whether tokens that mark begin and end are added; a chat template has written them already."""


class BadRecordError(ValueError):
    """A record that is no document; says why."""


@dataclass(frozen=True)
class Fields:
    """Where the documents of a file are: the text itself, or fields."""

    text: str | None = None
    prompt: str | None = None
    chat: str | None = None

    @property
    def has_answers(self) -> bool:
        """Whether only a part of each document is learned."""
        return self.chat is not None or self.prompt is not None

    def documents(self, record: Record, template: ChatTemplate | None, piece: int, longest: int) -> Iterator[Document]:
        """The documents of a record: none if its text is empty. Texts come in pieces of about `piece` characters, and
        those of which a part is learned of about `longest`. Raises `BadRecordError` or `ChatError`.
        """
        value = record.value
        if isinstance(value, str):
            if value:
                yield Document(value, side_of(value), record.span, begins=record.begins, ends=record.ends)
        elif self.chat is not None:
            assert template is not None and value is not None
            for whole in _conversation(value, self.chat, template):
                yield from _pieces(whole, longest)
        else:
            assert self.text is not None and value is not None
            text = _text(value, self.text)
            if not text:
                return
            prompt = "" if self.prompt is None else _text(value, self.prompt)
            both = prompt + text
            answers = None if self.prompt is None else ((len(prompt), len(both)),)
            size = piece if answers is None else longest
            yield from _pieces(Document(both, side_of(both), answers=answers), size)

    @property
    def columns(self) -> list[str] | None:
        """The columns of Parquet that are read; None if all may be needed."""
        return [name for name in (self.text, self.prompt) if name is not None] if self.chat is None else None


def side_of(text: str) -> int:
    """A hash of 64 bits, the same for the same text."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def fields_of(file: SourceFile, config: PrepareConfig) -> Fields:
    """Where the documents of a file are, by the config or by its first record.

    Raises `ArgumentError` if the file has no such field, or none with a usual name.
    """
    if file.kind == "text":
        named = [name for name in ("text_field", "chat_field") if getattr(config, name) is not None]
        if named:
            raise ArgumentError(f"`{named[0]}` is for JSON lines and Parquet. Got it with {file.path}, a file of text.")
        return Fields()
    if config.separator is not None:
        raise ArgumentError(f"`separator` is for text. Got it with {file.path}, in which each record is a document.")
    names = _names(file)
    if config.chat_field is not None or config.text_field is not None:
        chosen = Fields(config.text_field, config.prompt_field, config.chat_field)
        for flag in ("text_field", "prompt_field", "chat_field"):
            name = getattr(config, flag)
            if name is not None and name not in names:
                raise ArgumentError(f"`{flag}` must be a field of {file.path}. Got {name!r}; it has {_list(names)}.")
        return chosen
    for name in TEXT_FIELDS:
        if name in names:
            return Fields(text=name)
    for name in CHAT_FIELDS:
        if name in names:
            return Fields(chat=name)
    raise ArgumentError(
        f"{file.path} must have a field with the text. It has {_list(names)}. Name the field with `text_field`, or "
        "with `chat_field` for conversations."
    )


def _names(file: SourceFile) -> Sequence[str]:
    if file.kind == "parquet":
        return list(open_parquet(file.path).schema_arrow.names)
    start, first = Slice(file, 0, file.size, file.size), None
    for record in read_records(start, None, 0, None, lambda share: None):
        if isinstance(record.value, Mapping):
            return list(record.value)
        first = first or record
        if record.number >= SEARCHED_LINES:
            break
    why = "" if first is None else f" Line {first.number + 1}: {first.problem}."
    raise ArgumentError(f"{file.path} must have a JSON object in each line. None of its first lines has one.{why}")


def _list(names: Sequence[str]) -> str:
    return f"the fields {', '.join(map(repr, names[:20]))}" if names else "no field"


def _text(value: Mapping[str, Any], field: str) -> str:
    if field not in value:
        raise BadRecordError(f"it has no field {field!r}; it has {_list(list(value))}")
    text = value[field]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise BadRecordError(f"its field {field!r} must be a text. Got {type(text).__name__}")
    return _checked(text)


def _checked(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can escape such halves
        raise BadRecordError("its text has half of a surrogate pair, which is not a character") from None
    return text


def _conversation(value: Mapping[str, Any], field: str, template: ChatTemplate) -> Iterator[Document]:
    if field not in value:
        raise BadRecordError(f"it has no field {field!r}; it has {_list(list(value))}")
    messages, tools = messages_of(value[field]), value.get(TOOLS)
    if isinstance(tools, str):  # Parquet has no type for what differs in shape
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError as error:
            raise BadRecordError(f"its field {TOOLS!r} is not JSON: {error.msg}") from None
    side = side_of(_checked(json.dumps(messages, ensure_ascii=False, default=str)))
    for one in template.with_answers(messages, tools=tools or None):
        yield Document(one.text, side, answers=one.answers, special=False)


def _pieces(whole: Document, size: int) -> Iterator[Document]:
    """The document in pieces of about `size` characters, which end where lines or words do if possible.

    All are on one side if only answers are learned. Pieces of other texts are as good as texts of their own.
    """
    text, start = whole.text, 0
    while len(text) - start > size:
        ends = (text.rfind(end, start + size // 2, start + size) + 1 for end in "\n ")
        stop = next(filter(None, ends), start + size)
        yield _piece(whole, start, stop)
        start = stop
    if start < len(text):
        yield _piece(whole, start, len(text)) if start else whole


def _piece(whole: Document, start: int, stop: int) -> Document:
    text, begins, ends = whole.text[start:stop], start == 0, stop == len(whole.text)
    if whole.answers is None:
        return replace(whole, text=text, side=side_of(text), begins=begins, ends=ends)
    inside = [(max(first, start) - start, min(last, stop) - start) for first, last in whole.answers]
    answers = tuple((first, last) for first, last in inside if first < last)
    return replace(whole, text=text, answers=answers, begins=begins, ends=ends)
