"""How rotary positions are stretched, in config.json and here."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from meshpipe.models.rope import RopeScaling
from meshpipe.weights.errors import WeightsError
from meshpipe.weights.fields import Fields


def read_scaling(scaling: Fields, config: Fields) -> RopeScaling:
    """The scaling that a part of a config.json describes. Raises `WeightsError` for a kind not computed here."""
    kind = "rope_type" if "rope_type" in scaling.values else "type"
    if scaling.values.get(kind) == "dynamic":
        raise WeightsError(
            f"Rotary positions must be stretched alike for all texts. Got `dynamic` in {scaling.place}, by which they "
            "depend on the length of a text beyond `max_position_embeddings`. For shorter texts it changes nothing: "
            "then remove it from the file."
        )
    if scaling.values.get(kind) is None and scaling.values.get("factor") is not None:
        raise WeightsError(f"{scaling.place} must name its kind, as `rope_type`. It has a factor alone.")
    scaling.must_be("partial_rotary_factor", 1.0)
    return scaling.choice(kind, _READERS, "default")(scaling, config)


def _none(fields: Fields, config: Fields) -> RopeScaling:
    return RopeScaling()


def _linear(fields: Fields, config: Fields) -> RopeScaling:
    return RopeScaling(kind="linear", factor=fields.number("factor"))


def _llama3(fields: Fields, config: Fields) -> RopeScaling:
    return RopeScaling(
        kind="llama3",
        factor=fields.number("factor"),
        low_frequency_factor=fields.number("low_freq_factor"),
        high_frequency_factor=fields.number("high_freq_factor"),
        original_positions=_original_positions(fields, config),
    )


def _yarn(fields: Fields, config: Fields) -> RopeScaling:
    positions, asked = _original_positions(fields, config), fields.optional_number("attention_factor")
    factor = fields.optional_number("factor")
    if factor is None:
        factor = config.size("max_position_embeddings") / positions
    scales = [fields.optional_number(name) for name in ("mscale", "mscale_all_dim")]
    if asked is None and all(scales):  # as the models of DeepSeek have it
        of_scores, of_all = (0.1 * (scale or 0.0) * math.log(max(factor, 1.0)) + 1 for scale in scales)
        asked = of_scores / of_all
    return RopeScaling(
        kind="yarn",
        factor=factor,
        original_positions=positions,
        beta_fast=fields.optional_number("beta_fast") or 32.0,
        beta_slow=fields.optional_number("beta_slow") or 1.0,
        truncate=fields.flag("truncate", True),
        attention_factor=asked,
    )


def _original_positions(fields: Fields, config: Fields) -> int:
    name = "original_max_position_embeddings"
    if fields.values.get(name) is None and config.values.get(name) is None:
        return config.size("max_position_embeddings")
    return (fields if fields.values.get(name) is not None else config).size(name)


_READERS: Mapping[str, Callable[[Fields, Fields], RopeScaling]] = {
    "default": _none,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
}


def write_scaling(scaling: RopeScaling) -> dict[str, Any] | None:
    """The value of `rope_scaling`."""
    if scaling.kind == "none":
        return None
    made: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind != "linear":
        made["original_max_position_embeddings"] = scaling.original_positions
    if scaling.kind == "llama3":
        made |= {
            "low_freq_factor": scaling.low_frequency_factor,
            "high_freq_factor": scaling.high_frequency_factor,
        }
    if scaling.kind == "yarn":
        made |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow, "truncate": scaling.truncate}
        if scaling.attention_factor is not None:
            made["attention_factor"] = scaling.attention_factor
    return made
