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


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """Sources of text, the tokenizer, and how documents become windows. Raises `ArgumentError` for wrong settings."""

    sources: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="SOURCES...")] = ()
    """Files of text, of JSON lines (.jsonl, .ndjson) or of Parquet (.parquet), or folders of such files. Text and JSON
    lines may be compressed (.gz, .bz2, .xz)."""
    tokenizer: str
    """A tokenizer.json in Hugging Face's format, or the folder of a model that has one."""
    to: str
    """Folder to write to: new, empty, or where the same preparation was stopped."""
    sequence_length: int
    """Tokens that the model reads per window."""
    format: Format = "auto"
    """What the sources are; auto goes by their names, and takes unknown ones for text."""
    text_field: str | None = None
    """Field of JSON lines, or column of Parquet, with the text. By default `text`, unless there is none."""
    prompt_field: str | None = None
    """Field with a text in front of that of --text-field, from which nothing is learned."""
    chat_field: str | None = None
    """Field with a conversation: a list of messages with `role` and `content`. Only the assistant's messages are
    learned. By default `messages` or `conversations`, where there is no text."""
    chat_template: str | None = None
    """File with the chat template, in Jinja; by default the one beside the tokenizer."""
    date: str | None = None
    """Date that chat templates may write, as 2026-01-31. None leaves them without one."""
    separator: str | None = None
    """Text between the documents of a text file, such as '<|endoftext|>'; \\n stands for a new line. By default a file
    is one document, and a file of over 1 MiB is cut at ends of lines."""
    end_token: str = AUTO
    """Token after each document; auto is the tokenizer's own, none is none."""
    packing: Packing = "auto"
    """`cut`: documents follow each other, and are cut where a window ends, so that no place is wasted. `whole`: a
    document is cut only if it is longer than a window. Auto keeps whole where there are conversations or prompts."""
    held_out: float = 0.01
    """Share of the documents that is held out for evaluation, chosen by their text: equal documents are on one side. Of
    fewer than 100 text files without a separator, pieces are held out instead. 0 holds out none."""
    eval_sources: tuple[str, ...] = ()
    """Files or folders that are held out instead of a share."""
    skip_bad_lines: int = 0
    """Lines or rows that cannot be read and may be left out; one more ends the preparation."""
    part_size: int = 256
    """MiB of the sources per part. A preparation that was stopped continues with the part that it was at."""
    overwrite: bool = False
    """Replace data that was prepared otherwise, or from other sources."""

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
                "`prompt_field` goes with the field of the text that follows it. Pass `text_field` as well."
            )
        self.today  # noqa: B018, raises

    @property
    def today(self) -> datetime.date | None:
        try:
            return None if self.date is None else datetime.date.fromisoformat(self.date)
        except ValueError:
            raise ArgumentError(f"`date` must be a date as 2026-01-31. Got {self.date!r}.") from None

    @property
    def delimiter(self) -> bytes | None:
        """The separator as bytes."""
        if self.separator is None:
            return None
        return self.separator.replace("\\n", "\n").replace("\\t", "\t").encode()
