"""What is to be prepared, and how."""

import datetime
import math
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from meshpipe.data.manifest import LENGTH_LIMIT
from meshpipe.data.tokenizer import AUTO
from meshpipe.errors import ArgumentError, check_whole
from meshpipe.files import expand_fields

Format = Literal["auto", "text", "jsonl", "parquet"]
Packing = Literal["auto", "cut", "whole"]
MEBI = 1 << 20
PIECE_BYTES, BYTES_OF_POSITION, MOST_PIECE_BYTES = MEBI // 4, 8, 8 * MEBI
"""A text is tokenized in pieces of so many bytes, or of so many for each position of a window if that is more, up to
8 MiB. The tokenizer takes some hundred bytes of memory for each."""


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """Sources of text, the tokenizer, and how documents become windows. Raises `ArgumentError` for wrong settings."""

    sources: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="SOURCES...")] = ()
    """Text files, JSON lines (.jsonl, .ndjson) or Parquet (.parquet), or folders of these. Text and JSON lines may be
    compressed (.gz, .bz2, .xz)."""
    tokenizer: str
    """A tokenizer.json in Hugging Face's format, or the folder of a model that has one."""
    to: str
    """Output folder: new, empty, or that of the same preparation, which then continues."""
    sequence_length: int
    """Length of a window: the tokens that the model reads at once."""
    format: Format = "auto"
    """Format of the sources. `auto` decides by file name, and treats unknown names as text."""
    text_field: str | None = None
    """JSON field or Parquet column that holds the text. None takes `text`, if there is one."""
    prompt_field: str | None = None
    """Field with the prompt in front of the text of --text-field. Prompts do not count in the loss."""
    chat_field: str | None = None
    """Field with a conversation: a list of messages with `role` and `content`. Only the assistant's messages count in
    the loss. None takes `messages` or `conversations`, where there is no text."""
    chat_template: str | None = None
    """File with a chat template in Jinja. None takes the one beside the tokenizer."""
    date: str | None = None
    """Date for chat templates that write one, such as 2026-01-31. None gives them no date."""
    separator: str | None = None
    """Text between the documents of a text file, such as '<|endoftext|>'; \\n stands for a newline. None takes each
    file as one document, and cuts files of over 256 KiB at line ends."""
    end_token: str = AUTO
    """Token after each document. `auto` takes the tokenizer's own; `none` adds none."""
    packing: Packing = "auto"
    """`cut` fills every window and cuts documents where it ends. `whole` cuts only documents that are longer than a
    window. `auto` is `whole` for conversations and prompts, and `cut` for other text."""
    held_out: float = 0.01
    """Share of the documents to hold out for evaluation. A hash of the text decides, so equal documents fall on one
    side. With fewer than 100 text files and no separator, pieces of files are held out. 0 holds out nothing."""
    eval_sources: tuple[str, ...] = ()
    """Files or folders to hold out, instead of a share."""
    skip_bad_lines: int = 0
    """Unreadable lines or rows to leave out; one more ends the preparation."""
    part_size: int = 256
    """Size of a part of the sources, in MiB. An interrupted preparation continues at the part where it stopped."""
    overwrite: bool = False
    """Replace data that was prepared with other settings or from other sources."""

    def __post_init__(self) -> None:
        expand_fields(self, "tokenizer", "to", "chat_template")
        if not self.sources:
            raise ArgumentError("There must be at least one source: a file or a folder. Got none.")
        check_whole("sequence_length", self.sequence_length, below=LENGTH_LIMIT)
        check_whole("skip_bad_lines", self.skip_bad_lines, 0)
        check_whole("part_size", self.part_size)
        if not (math.isfinite(self.held_out) and 0 <= self.held_out < 1):
            raise ArgumentError(f"`held_out` must be at least 0 and below 1. Got {self.held_out}.")
        if self.separator == "":
            raise ArgumentError("`separator` must not be empty. Leave it out to take each file for one document.")
        if self.chat_field is not None and (self.text_field is not None or self.prompt_field is not None):
            raise ArgumentError(
                "A document is a text or a conversation. Got `chat_field` with "
                f"{'`text_field`' if self.text_field is not None else '`prompt_field`'}. Pass one of them."
            )
        if self.prompt_field is not None and self.text_field is None:
            raise ArgumentError(
                "`prompt_field` needs `text_field`, the text that follows the prompt. Pass `text_field` as well."
            )
        self.today  # noqa: B018, raises

    @property
    def today(self) -> datetime.date | None:
        try:
            return None if self.date is None else datetime.date.fromisoformat(self.date)
        except ValueError:
            raise ArgumentError(f"`date` must be a date as 2026-01-31. Got {self.date!r}.") from None

    @property
    def longest_piece(self) -> int:
        """Bytes or characters of a text, about, that are tokenized at once: some windows, and not much memory."""
        return min(max(PIECE_BYTES, BYTES_OF_POSITION * self.sequence_length), MOST_PIECE_BYTES)

    @property
    def delimiter(self) -> bytes | None:
        """The separator as bytes."""
        if self.separator is None:
            return None
        return self.separator.replace("\\n", "\n").replace("\\t", "\t").encode()
