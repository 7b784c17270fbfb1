"""Weights that were quantised: how their config.json and their tensors tell, and what to read in their place."""

from collections.abc import Iterable, Mapping

from meshpipe.weights.errors import WeightsError
from meshpipe.weights.fields import Fields

WAY_OUT = "Quantised weights are not read: take the folder of the model before it was quantised."
_FIELDS = ("quantization_config", "compression_config")
_ENDS = (
    ".qweight",  # GPTQ and AWQ
    ".qzeros",
    ".scales",
    ".weight_scale",  # FP8, and the others of compressed-tensors
    ".weight_scale_inv",
    ".weight_packed",
    ".SCB",  # bitsandbytes
    ".absmax",
    ".quant_map",
)
"""Ends of the names of tensors that only quantised weights have."""


def check_not_quantised(fields: Fields) -> None:
    """Raises `WeightsError` for a config.json of quantised weights."""
    for name in _FIELDS:
        found = fields.values.get(name)
        if found is not None:
            method = found.get("quant_method") if isinstance(found, Mapping) else None
            got = f"`{name}` of the method {method!r:.40}" if method is not None else f"`{name}`"
            raise WeightsError(f"Weights must be floating numbers. Got {got} in {fields.place}. {WAY_OUT}")


def are_quantised(names: Iterable[str]) -> bool:
    """Whether tensors with these names are of quantised weights."""
    return any(name.endswith(_ENDS) for name in names)
