"""The model of a run that begins with the weights in a folder: what it is stands there, not in the recipe."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, NoReturn

from meshpipe.checkpoint.inspection import reader_of
from meshpipe.errors import ArgumentError
from meshpipe.models.attention import AttentionName
from meshpipe.models.model import LayerConstructor, ModelConfig, SumAndWeight
from meshpipe.weights.model_of import model_of


@dataclass(frozen=True, kw_only=True)
class PublishedModel(ModelConfig):
    """The model of the folder that the run begins with, `init_from`, or of its own checkpoints when it is resumed.

    A `Config` puts that model in its place, with these settings of how it is computed.
    """

    input: ClassVar[str] = "inputs"

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of computation; parameters are float32. bfloat16 is for accelerators."""
    attention: AttentionName = "auto"
    """How attention is computed; `meshpipe plan` says what is chosen."""

    def found(self, init_from: str | None, checkpoints: str | None) -> ModelConfig:
        """The model in the folder of a run's own checkpoints, if they are given and there, or in `init_from`; itself
        where neither says. Raises `ValueError` for a folder without weights.
        """
        own = checkpoints is not None and bool(reader_of(checkpoints).steps())
        folder = checkpoints if own else init_from
        if folder is None:
            return self
        changes: Any = {"dtype": self.dtype, "attention": self.attention}
        return replace(model_of(folder), **changes)

    def layers(self) -> list[LayerConstructor]:
        self._unknown()

    def loss(self, output: Any, batch: Mapping[str, Any], *args: Any, **kwargs: Any) -> SumAndWeight:
        self._unknown()

    def _unknown(self) -> NoReturn:
        raise ArgumentError(
            "This recipe tunes a model that is there, and `init_from` names the folder of its weights. Got none. Pass "
            "`init_from` FOLDER, with config.json and files of safetensors, or a folder of checkpoints."
        )
