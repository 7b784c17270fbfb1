"""The prompts of `meshpipe generate`."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from meshpipe.data.chat import ChatError, ChatTemplate, messages_of
from meshpipe.errors import ArgumentError
from meshpipe.files import expand_fields
from meshpipe.phases import each

if TYPE_CHECKING:
    from meshpipe.generation.tokenizer import TextTokenizer

Value = str | list[dict[str, Any]]
"""A text, or the messages of a conversation."""


@dataclass(frozen=True, kw_only=True)
class PromptFlags:
    """What to continue, and how to print it."""

    prompt: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Text to continue; may be repeated."""
    prompts: Path | None = None
    """File with one prompt per line; empty lines are skipped. In a .jsonl file, each line is a JSON string, an object
    with a `prompt`, or, with `--chat`, an object with the `messages` of a conversation."""
    stop: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Text that ends a text, and is no part of it; may be repeated."""
    chat: bool = False
    """Treat each prompt as a user's message, written by the tokenizer's chat template."""
    json: bool = False
    """Print one JSON object per line, with `prompt` (or `messages`), `text` and `tokens`, instead of text."""
    tokenizer: Path | None = None
    """A tokenizer.json, or a folder with one. None takes that of the model."""
    ignore_end: bool = False
    """Continue after the model's end token."""

    def __post_init__(self) -> None:
        expand_fields(self, "prompts", "tokenizer")

    def read(self) -> "list[Prompt]":
        """All prompts, in their order. Raises `ArgumentError` for none, and for a file that cannot be read."""
        found: list[Value] = [*self.prompt, *([] if self.prompts is None else read_prompts(self.prompts))]
        if not found:
            raise ArgumentError("generate needs at least one `prompt`, or a file of `prompts`. Got none.")
        if not self.chat and any(not isinstance(value, str) for value in found):
            raise ArgumentError("Prompts of several `messages` need `chat`, which writes them. Got them without it.")
        return [Prompt(value, self.chat) for value in found]


@dataclass(frozen=True)
class Prompt:
    """What is continued."""

    value: Value
    chat: bool = False
    """Whether a text is the message of a user, and the chat template writes what the model reads."""

    @property
    def shown(self) -> str:
        """What is printed in front of the text that follows."""
        text = self.value if isinstance(self.value, str) else str(self.value[-1].get("content", ""))
        return f"{text}\n" if self.chat else text

    def as_json(self) -> dict[str, Any]:
        """What an object about the prompt has of it."""
        return {"prompt" if isinstance(self.value, str) else "messages": self.value}

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The conversation that it is, or begins."""
        return [{"role": "user", "content": self.value}] if isinstance(self.value, str) else self.value


def encode_prompts(prompts: Sequence[Prompt], tokenizer: "TextTokenizer") -> list[list[int]]:
    """The tokens of each. Raises `ValueError` for conversations and a tokenizer without a chat template, and for
    messages that it refuses.
    """
    template = _template(tokenizer) if any(prompt.chat for prompt in prompts) else None
    if template is None:
        return [tokenizer.encode(str(prompt.value)) for prompt in each("Tokenizing", "prompt", prompts)]
    # A template is a program, which may take its time.
    rendered = each("Rendering the chat template for", "prompt", prompts)
    return [tokenizer.encode(template.render(prompt.messages, prompt=True), special=False) for prompt in rendered]


def _template(tokenizer: "TextTokenizer") -> ChatTemplate:
    make = getattr(tokenizer, "template", None)
    template: ChatTemplate | None = None if make is None else make()
    if template is None:
        raise ArgumentError("`chat` needs a tokenizer with a chat template. Got one without. Leave `chat` out.")
    return template


def checked_tokenizer(tokenizer: "TextTokenizer | None") -> "TextTokenizer":
    if tokenizer is None:
        raise ArgumentError(
            "Text needs the tokenizer that the model was trained with. Got none, and the folder tells of none. Pass "
            "`tokenizer` FILE."
        )
    return tokenizer


def read_prompts(file: Path) -> list[Value]:
    """The prompts of a file, a line each: texts, or lists of messages. Raises `ArgumentError` for a file or line that
    cannot be read.
    """
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")  # in text, there are further ends of lines
    except (OSError, UnicodeDecodeError) as error:
        raise ArgumentError(f"`prompts` must name a text file in UTF-8. Got {str(file)!r}: {error}.") from None
    found: list[Value] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if file.suffix != ".jsonl":
            found.append(line.removesuffix("\r"))
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ArgumentError(f"Every line of `prompts` must be JSON. Got {file}, line {number}: {error}.") from None
        if isinstance(value, dict) and "messages" in value:
            try:
                found.append(messages_of(value["messages"]))
            except ChatError as error:
                raise ArgumentError(f"`messages` must be a conversation. In {file}, line {number}, {error}.") from None
            continue
        text = value.get("prompt") if isinstance(value, dict) else value
        if not isinstance(text, str):
            raise ArgumentError(
                "Every line of `prompts` must be a JSON text, or an object with a text named prompt or with messages. "
                f"Got {line!r:.60} in {file}, line {number}."
            )
        found.append(text)
    return found
