"""The model of a run that begins with the weights in a folder: what it is stands there, not in the recipe."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, NoReturn

from meshpipe.checkpoint.inspection import reader_of
from meshpipe.errors import ArgumentError
from meshpipe.models.attention import AttentionName
from meshpipe.models.model import LayerConstructor, ModelConfig, SumAndWeight
from meshpipe.weights.folder import WeightsFolder, is_published
from meshpipe.weights.model_of import model_of


@dataclass(frozen=True, kw_only=True)
class PublishedModel(ModelConfig):
    """The model of the folder that the run begins with, `init_from`, or of its own checkpoints when it is resumed.

    A `Config` puts that model in its place, with these settings of how it is computed.
    """

    input: ClassVar[str] = "inputs"

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of computation; bfloat16 is for accelerators."""
    param_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of the parameters below adapters, which are float32 themselves, or of those that are trained. `auto` is
    float32, but bfloat16 for weights below adapters whose file has them so and that are computed so: the same values in
    a third of the memory, since float32 has a copy in bfloat16. Of a folder of checkpoints, it is that of the
    checkpoint."""
    attention: AttentionName = "auto"
    """How attention is computed; `meshpipe plan` says what is chosen."""

    def found(
        self, init_from: str | None, checkpoints: str | None, *, base: str | None = None, frozen: bool = False
    ) -> ModelConfig:
        """The model in the folder of a run's own checkpoints, if they are given and there, or in `init_from`; itself
        where neither says.

        `base` is the folder below adapters in `init_from`. `frozen` says whether adapters are trained in its place.
        Raises `ValueError` for a folder without weights.
        """
        own = checkpoints is not None and bool(reader_of(checkpoints).steps())
        folder, base = (checkpoints, None) if own else (init_from, base)
        if folder is None:
            return self
        changes: Any = {"dtype": self.dtype, "attention": self.attention}
        if self.param_dtype != "auto":
            changes["param_dtype"] = self.param_dtype
        elif frozen and self.dtype == "bfloat16" and is_published(folder):
            changes["param_dtype"] = WeightsFolder(folder, base, "init_base").param_dtype
        return replace(model_of(folder, init_base=base), **changes)

    def layers(self) -> list[LayerConstructor]:
        self._unknown()

    def loss(self, output: Any, batch: Mapping[str, Any], *args: Any, **kwargs: Any) -> SumAndWeight:
        self._unknown()

    def _unknown(self) -> NoReturn:
        raise ArgumentError(
            "This recipe tunes a model that is there, and `init_from` names the folder of its weights. Got none. Pass "
            "`init_from` FOLDER, with config.json and files of safetensors, or a folder of checkpoints."
        )
