"""What all parts of a preparation have in common."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from meshpipe.data.chat import ChatTemplate
from meshpipe.data.packing import Following, Packer, Whole
from meshpipe.data.preparation.config import MEBI, PrepareConfig
from meshpipe.data.preparation.documents import Fields, fields_of
from meshpipe.data.preparation.sources import Found, Part, SourceFile, find_files, make_parts
from meshpipe.data.tokenizer import AUTO, NONE, Tokenizer
from meshpipe.errors import ArgumentError
from meshpipe.files import expanded

REVISION = 2
"""Changes with what the same settings give, so that parts of an older version are made again."""
LEAST_PIECE_BYTES = 1024
FEW = 100
"""Fewer text files than these are held out by pieces, not as a whole."""


@dataclass(frozen=True)
class Job:
    """A preparation, with all that its config says looked up."""

    config: PrepareConfig
    tokenizer: Tokenizer
    template: ChatTemplate | None
    end: int | None
    """The token after each document."""
    files: Found
    fields: Mapping[Path, Fields]
    """By file."""
    is_whole: bool
    """Whether documents are kept whole."""
    piece_bytes: int
    """How long a piece of a text may be, about."""
    offsets: Mapping[Path, int]
    """By text file, the bytes of those before it, if pieces of them are held out by their place."""
    parts: Sequence[Part]

    @classmethod
    def of(cls, config: PrepareConfig) -> "Job":
        """Looks up everything, and writes nothing. Raises `ArgumentError` for what cannot be prepared."""
        tokenizer = Tokenizer(config.tokenizer)
        to = expanded("to", config.to).absolute()
        found = find_files(config.sources, config.format, "Sources", to)
        held_out = find_files(config.eval_sources, config.format, "`eval_sources`", to)
        both = Found(found.files + held_out.files, found.others + held_out.others)
        if len(set(both.files)) < len(both.files):
            twice = next(file for file in both.files if both.files.count(file) > 1)
            raise ArgumentError(f"Every source must be given once. Got {str(twice.path)!r} twice.")
        fields = {file.path: fields_of(file, config) for file in both.files}
        by_place = _held_out_by_place(config, found.files)
        sizes = [file.size for file in by_place]
        has_answers = any(one.has_answers for one in fields.values())
        return cls(
            config=config,
            tokenizer=tokenizer,
            template=_template(config, tokenizer, any(one.chat is not None for one in fields.values())),
            end=_end(config, tokenizer),
            files=both,
            fields=fields,
            is_whole=config.packing == "whole" or (config.packing == "auto" and has_answers),
            piece_bytes=_piece_bytes(config, by_place),
            offsets=dict(zip((file.path for file in by_place), accumulate(sizes, initial=0), strict=False)),
            parts=make_parts(found.files, held_out.files, config.part_size * MEBI, config.delimiter),
        )

    @property
    def dtype(self) -> np.dtype:
        """Of tokens in files."""
        return np.dtype("<u2" if self.tokenizer.vocab_size <= 1 << 16 else "<u4")

    @property
    def held_out(self) -> float:
        """The share of the documents that is held out; with sources of its own, none."""
        return 0.0 if self.config.eval_sources else self.config.held_out

    def packer(self) -> Packer:
        length = self.config.sequence_length
        return Whole(length) if self.is_whole else Following(length)

    def settings(self) -> dict[str, Any]:
        """What the windows depend on besides the sources, as JSON values."""
        config = self.config
        template = None if self.template is None else hashlib.sha256(self.template.source.encode()).hexdigest()
        return {
            "revision": REVISION,
            "tokenizer": self.tokenizer.digest,
            "end_token": self.end,
            "chat_template": template,
            "date": config.date if template else None,
            "sequence_length": config.sequence_length,
            "packing": "whole" if self.is_whole else "cut",
            "separator": config.separator,
            "held_out": self.held_out,
            "text_field": config.text_field,
            "prompt_field": config.prompt_field,
            "chat_field": config.chat_field,
            "piece_bytes": self.piece_bytes,
            "part_size": config.part_size,
        }

    def key(self, part: Part) -> str:
        """The same for a part that would come out the same."""
        return _digest([self.settings(), part.number, part.held_out, [one.key() for one in part.slices]])

    def inputs(self) -> str:
        """The same for a preparation that would come out the same."""
        return _digest([self.key(part) for part in self.parts])


def _digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _template(config: PrepareConfig, tokenizer: Tokenizer, is_needed: bool) -> ChatTemplate | None:
    if config.chat_template is not None and not is_needed:
        raise ArgumentError("`chat_template` is for conversations. Got it with sources that have none. Leave it out.")
    if not is_needed:
        return None
    if config.chat_template is None:
        template = tokenizer.template(config.today)
        if template is None:
            raise ArgumentError(
                f"Conversations need a chat template. Got none beside {tokenizer.file}: neither chat_template.jinja "
                "nor one in tokenizer_config.json, as with many base models. Pass one as `chat_template`."
            )
        return template
    try:
        source = Path(config.chat_template).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ArgumentError(f"`chat_template` must be a text file. Got {config.chat_template!r}: {error}.") from error
    return ChatTemplate(source, tokenizer.special_names, config.today)


def _end(config: PrepareConfig, tokenizer: Tokenizer) -> int | None:
    if config.end_token == NONE:
        return None
    end = tokenizer.end if config.end_token == AUTO else tokenizer.token(config.end_token)
    if end is None and config.end_token == AUTO:
        raise ArgumentError(
            f"Documents end with a token. Got {tokenizer.file}, which does not say which. Pass the name of one as "
            "`end_token`, or none."
        )
    if end is None:
        raise ArgumentError(f"`end_token` must be a token of the tokenizer. Got {config.end_token!r}, which is none.")
    return end


def _held_out_by_place(config: PrepareConfig, files: Sequence[SourceFile]) -> list[SourceFile]:
    """The text files of which pieces are held out: few files without documents inside, such as a single one."""
    texts = [file for file in files if file.kind == "text"]
    is_wanted = config.held_out and not config.eval_sources and config.separator is None
    return texts if is_wanted and len(texts) < FEW else []


def _piece_bytes(config: PrepareConfig, by_place: Sequence[SourceFile]) -> int:
    """Texts are cut only where they are very long, or a piece is to be held out: at least one is."""
    if not by_place:
        return config.longest_piece
    share = config.held_out * sum(file.size for file in by_place)
    return min(config.longest_piece, max(LEAST_PIECE_BYTES, int(share)))
