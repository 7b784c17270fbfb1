"""Images of handwritten digits: 1,797 of 8 x 8 pixels, which scikit-learn ships."""

import functools
from dataclasses import dataclass

import numpy as np

from meshpipe.data.batch import DataConfig
from meshpipe.errors import ArgumentError

HELD_OUT = 5
"""One image in five is held out."""


class Digits:
    """The images of one part of the data set. Fields: `images` float32 [8, 8, 1], 0 to 1; `labels` int32 []."""

    def __init__(self, *, held_out: bool) -> None:
        images, labels = _load()
        chosen = (np.arange(len(labels)) % HELD_OUT == 0) == held_out
        self._images, self._labels = images[chosen], labels[chosen]
        self._held_out = held_out

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {"images": self._images[index], "labels": self._labels[index]}

    def __repr__(self) -> str:
        return f"Digits(held_out={self._held_out}, images={len(self)})"


@dataclass(frozen=True, kw_only=True)
class DigitsConfig(DataConfig):
    """Handwritten digits of 8 x 8 pixels (Alpaydin and Kaynak, UCI, 1998). Every fifth image is held out."""

    def train_source(self) -> Digits:
        return Digits(held_out=False)

    def eval_source(self) -> Digits:
        return Digits(held_out=True)


@functools.cache
def _load() -> tuple[np.ndarray, np.ndarray]:
    try:
        from sklearn.datasets import load_digits  # late: few recipes need it
    except ImportError as error:
        raise ArgumentError(
            "The digits are images that scikit-learn ships. It is not installed. Install it: "
            "pip install 'meshpipe[digits]', or scikit-learn itself.",
            "data",
        ) from error
    digits = load_digits()
    return (digits.images[..., None] / 16).astype(np.float32), digits.target.astype(np.int32)
