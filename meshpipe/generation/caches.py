"""The caches of groups of texts: how large they are, and whether they fit, before they are allocated."""

from collections.abc import Sequence
from dataclasses import dataclass

from meshpipe.choose.memory import device_bytes
from meshpipe.errors import ArgumentError
from meshpipe.generation.caching_model import CachingModel
from meshpipe.generation.memory import lacking
from meshpipe.machine import format_bytes


@dataclass(frozen=True, kw_only=True)
class Caches:
    """The caches of groups of texts, and of the few rows that read further prompts."""

    whole: CachingModel
    few: CachingModel
    """As those of `Decoder`."""
    groups: int

    @property
    def nbytes(self) -> Sequence[int]:
        """By rank, the bytes that each of its devices has."""
        ranks = range(len(self.whole.model.stages))
        own = [self.groups * device_bytes(self.whole.caches(rank)) for rank in ranks]
        if self.few is self.whole:
            return own
        return [of_groups + device_bytes(self.few.caches(rank)) for rank, of_groups in enumerate(own)]

    def check(self, asked: str) -> None:
        """Raises `ArgumentError`, which repeats what was `asked`, when they do not fit into a memory of this process.
        With the programs, texts need somewhat more than that.
        """
        need = lacking(self.whole.model.mesh, [{"caches": size} for size in self.nbytes])
        if need is not None:
            raise ArgumentError(
                f"The keys and values of all texts in progress must fit into {need.where}. Got {asked}: they need "
                f"{format_bytes(need.total)}, and {format_bytes(need.free)} are free. Lower `max_tokens`, `batch_size` "
                "or `in_flight`, or shorten the prompts."
            )

    def __str__(self) -> str:
        groups = f"{self.groups} groups of " if self.groups > 1 else ""
        texts = "text" if self.whole.batch == 1 else "texts"
        return (
            f"Caches of {groups}{self.whole.batch} {texts} of up to {self.whole.length:,} positions take "
            f"{format_bytes(max(self.nbytes))} of each device."
        )
