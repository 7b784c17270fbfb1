"""What turns text into tokens and back, and where to find it."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

from meshpipe.errors import ArgumentError
from meshpipe.models.model import ModelConfig

TOKENIZER = "tokenizer.json"
_CONTEXT = 4
"""Tokens of a prompt that what follows is decoded with."""


@runtime_checkable
class TextTokenizer(Protocol):
    """What generation needs of a tokenizer, such as `meshpipe.data.tokenizer.Tokenizer`."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def begin(self) -> int | None:
        """The token in front of a text, if there is one."""

    @property
    def end(self) -> int | None:
        """The token that ends a text, if there is one."""

    def encode(self, text: str, *, special: bool = True) -> list[int]: ...

    def decode(self, tokens: Iterable[int]) -> str: ...


class ByteTokenizer:
    """The bytes of UTF-8, which the byte-level data of recipes has as its tokens."""

    vocab_size = 256
    begin: int | None = None
    end: int | None = None

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        return list(utf8(text))

    def decode(self, tokens: Iterable[int]) -> str:
        return bytes(tokens).decode(errors="replace")


def utf8(text: str) -> bytes:
    """The bytes of a text. Raises `ArgumentError` for one that UTF-8 cannot hold, as the argument of a command may."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise ArgumentError(f"A text must be one that UTF-8 can hold. Got {text!r:.100}.") from None


def decode_after(tokenizer: TextTokenizer, prompt: Sequence[int], tokens: Sequence[int]) -> str:
    """The text of tokens that follow a prompt. Some tokenizers leave out the space in front of a text, which belongs
    between the two.
    """
    context = list(prompt[-_CONTEXT:])
    before = tokenizer.decode(context)
    both = tokenizer.decode([*context, *tokens]) if before else ""
    return both[len(before) :] if before and both.startswith(before) else tokenizer.decode(tokens)


def first_token(tokenizer: TextTokenizer) -> int:
    """What a text without a context comes after: the token that begins texts, or else the one that ends them. Raises
    `ArgumentError` for a tokenizer that has neither.
    """
    found = tokenizer.end if tokenizer.begin is None else tokenizer.begin
    if found is None:
        raise ArgumentError(
            "The first token of a text can be scored only after a token that begins or ends texts. The tokenizer has "
            "neither. Give every text a context."
        )
    return found


def encode_text(tokenizer: TextTokenizer, text: str) -> list[int]:
    """The tokens of a text, with the one in front of it once, whether the text has it or the tokenizer adds it."""
    tokens = tokenizer.encode(text)
    return tokens[1:] if tokenizer.begin is not None and tokens[:2] == [tokenizer.begin] * 2 else tokens


def encode_pair(tokenizer: TextTokenizer, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """The tokens of a context that is not empty and of its continuation, as those of both together begin and go on.

    Spaces at the end of the context become part of the continuation, since most tokens begin with their space.
    """
    kept = context.rstrip()
    if kept:
        context, continuation = kept, context[len(kept) :] + continuation
    beginning = encode_text(tokenizer, context)
    return beginning, encode_text(tokenizer, context + continuation)[len(beginning) :]


def find_tokenizer(model: ModelConfig, given: str | Path | None, folders: Sequence[Path]) -> TextTokenizer | None:
    """The tokenizer in the file or folder `given`, or in the first of `folders` that has one; or bytes, for a model of
    256 tokens. None where nothing tells. Raises `ArgumentError` for a tokenizer with more tokens than the model.
    """
    vocab = model.limits().get(model.input)
    place = given if given is not None else next((f for f in folders if os.path.isfile(f / TOKENIZER)), None)
    if place is None:
        return ByteTokenizer() if vocab == ByteTokenizer.vocab_size else None
    from meshpipe.data.tokenizer import Tokenizer

    tokenizer = Tokenizer(place)
    if vocab is not None and tokenizer.vocab_size > vocab:
        raise ArgumentError(
            f"`tokenizer` must be the one that the model was trained with. Got {place} with {tokenizer.vocab_size:,} "
            f"tokens for a model of {vocab:,}."
        )
    return tokenizer
