"""Documents from the records of files: which field is the text, and what of it is learned."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
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
    side: str
    """What decides whether it is held out: documents with the same are on the same side."""
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

    def documents(self, record: Record, template: ChatTemplate | None, piece: int) -> Iterator[Document]:
        """The documents of a record: none if its text is empty. Raises `BadRecordError` or `ChatError`."""
        value = record.value
        if isinstance(value, str):
            if value:
                yield Document(value, value, record.span, begins=record.begins, ends=record.ends)
        elif self.chat is not None:
            assert template is not None and value is not None
            yield from _conversation(value, self.chat, template)
        else:
            assert self.text is not None and value is not None
            text = _text(value, self.text)
            if self.prompt is None:
                yield from _pieces(text, piece)
            elif text:
                prompt = _text(value, self.prompt)
                both = prompt + text
                yield Document(both, both, answers=((len(prompt), len(both)),))


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
    for record in read_records(start, None, 0, lambda share: None):
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
    side = _checked(json.dumps(messages, ensure_ascii=False, default=str))
    for one in template.with_answers(messages, tools=tools or None):
        yield Document(one.text, side, answers=one.answers, special=False)


def _pieces(text: str, size: int) -> Iterator[Document]:
    """The text in pieces of about `size` characters, which end where lines or words do if possible."""
    begins = True
    while len(text) > size:
        cut = next((place + 1 for end in "\n " if (place := text.rfind(end, size // 2, size)) >= 0), size)
        yield Document(text[:cut], text[:cut], begins=begins, ends=False)
        text, begins = text[cut:], False
    if text:
        yield Document(text, text, begins=begins)
