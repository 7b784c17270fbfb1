"""The prompts of `meshpipe generate`."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from meshpipe.errors import ArgumentError
from meshpipe.files import expand_fields

if TYPE_CHECKING:
    from meshpipe.generation.tokenizer import TextTokenizer


@dataclass(frozen=True, kw_only=True)
class PromptFlags:
    """What to continue, and how to print it."""

    prompt: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Text to continue; may be repeated."""
    prompts: Path | None = None
    """File with one prompt per line. In a .jsonl file, each line is a JSON string or an object with a `prompt`."""
    chat: bool = False
    """Treat each prompt as a user's message, written by the tokenizer's chat template."""
    json: bool = False
    """Print one JSON object per line, with `prompt`, `text` and `tokens`, instead of text."""
    tokenizer: Path | None = None
    """A tokenizer.json, or a folder with one. None takes that of the model."""
    ignore_end: bool = False
    """Continue after the model's end token."""

    def __post_init__(self) -> None:
        expand_fields(self, "prompts", "tokenizer")

    def texts(self) -> list[str]:
        """All prompts, in their order. Raises `ArgumentError` for none, and for a file that cannot be read."""
        found = [*self.prompt, *([] if self.prompts is None else read_prompts(self.prompts))]
        if not found:
            raise ArgumentError("generate needs at least one `prompt`, or a file of `prompts`. Got none.")
        return found


def checked_tokenizer(tokenizer: "TextTokenizer | None") -> "TextTokenizer":
    if tokenizer is None:
        raise ArgumentError(
            "Text needs the tokenizer that the model was trained with. Got none, and the folder tells of none. Pass "
            "`tokenizer` FILE."
        )
    return tokenizer


def encoded(tokenizer: "TextTokenizer", text: str, *, chat: bool) -> list[int]:
    """The tokens of a prompt; with `chat`, of the message of a user in the tokenizer's chat template."""
    if not chat:
        return tokenizer.encode(text)
    make = getattr(tokenizer, "template", None)
    template = None if make is None else make()
    if template is None:
        raise ArgumentError("`chat` needs a tokenizer with a chat template. Got one without. Leave `chat` out.")
    return tokenizer.encode(template.render([{"role": "user", "content": text}], prompt=True), special=False)


def read_prompts(file: Path) -> list[str]:
    """The prompts of a file, a line each. Raises `ArgumentError` for a file or line that cannot be read."""
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")  # in text, there are further ends of lines
    except (OSError, UnicodeDecodeError) as error:
        raise ArgumentError(f"`prompts` must name a text file in UTF-8. Got {str(file)!r}: {error}.") from None
    found: list[str] = []
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
        text = value.get("prompt") if isinstance(value, dict) else value
        if not isinstance(text, str):
            raise ArgumentError(
                "Every line of `prompts` must be a JSON text, or an object with a text named prompt. "
                f"Got {line!r:.60} in {file}, line {number}."
            )
        found.append(text)
    return found
