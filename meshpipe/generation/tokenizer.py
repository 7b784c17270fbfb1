"""What turns text into tokens and back."""

from collections.abc import Iterable
from typing import Protocol, runtime_checkable


@runtime_checkable
class TextTokenizer(Protocol):
    """What generation needs of a tokenizer, such as `meshpipe.data.tokenizer.Tokenizer`."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def end(self) -> int | None:
        """The token that ends a text, if there is one."""

    def encode(self, text: str, *, special: bool = True) -> list[int]: ...

    def decode(self, tokens: Iterable[int]) -> str: ...


class ByteTokenizer:
    """The bytes of UTF-8, which the byte-level data of recipes has as its tokens."""

    vocab_size = 256
    end: int | None = None

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        return list(text.encode())

    def decode(self, tokens: Iterable[int]) -> str:
        return bytes(tokens).decode(errors="replace")
