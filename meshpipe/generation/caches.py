"""How large the caches of groups of texts are, before they are allocated."""

from collections.abc import Sequence
from dataclasses import dataclass

from meshpipe.choose.memory import device_bytes
from meshpipe.generation.decoder import Decoder
from meshpipe.machine import format_bytes


@dataclass(frozen=True)
class Caches:
    """The caches of groups of texts, and of the few rows that read further prompts."""

    decoder: Decoder
    groups: int

    @property
    def nbytes(self) -> Sequence[int]:
        """By rank, the bytes that each of its devices has."""
        whole, few = self.decoder.whole, self.decoder.few
        ranks = range(len(whole.model.stages))
        own = [self.groups * device_bytes(whole.caches(rank)) for rank in ranks]
        return own if few is whole else [own[rank] + device_bytes(few.caches(rank)) for rank in ranks]

    def __str__(self) -> str:
        groups = f"{self.groups} groups of " if self.groups > 1 else ""
        texts = "text" if self.decoder.batch == 1 else "texts"
        return (
            f"Caches of {groups}{self.decoder.batch} {texts} of up to {self.decoder.whole.length:,} positions take "
            f"{format_bytes(max(self.nbytes))} of each device."
        )
