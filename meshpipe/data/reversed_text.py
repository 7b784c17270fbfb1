"""Windows of text whose target is the same text backwards: for models that read one text and write another."""

from dataclasses import dataclass

import numpy as np

from meshpipe.data.text import Example, PackedWindows, TextFilesConfig


class ReversedWindows:
    """Every window of a text, with itself backwards as the target.

    Fields, each int32 [seq]: `source`, the window; `targets`, the window backwards; `inputs`, the targets one place
    later, after a zero byte.
    """

    def __init__(self, windows: PackedWindows) -> None:
        self._windows = windows

    def __len__(self) -> int:
        return len(self._windows)

    def __getitem__(self, index: int) -> Example:
        source = self._windows[index]["inputs"]
        targets = np.ascontiguousarray(source[::-1])
        return {"source": source, "inputs": np.concatenate([[0], targets[:-1]]).astype(np.int32), "targets": targets}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._windows!r})"


@dataclass(frozen=True, kw_only=True)
class ReversedTextConfig(TextFilesConfig):
    """Text, byte by byte, to be written backwards: Python source that every machine has, or your own files.

    About a seventh of the files is held out.
    """

    sequence_length: int = 16
    """Bytes of a window, which the model reads and writes."""

    def train_source(self) -> ReversedWindows:  # type: ignore[override]
        return ReversedWindows(super().train_source())

    def eval_source(self) -> ReversedWindows:  # type: ignore[override]
        return ReversedWindows(super().eval_source())
