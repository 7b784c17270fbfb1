"""The adapters in a folder of PEFT, by the leaf paths that they have here."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from meshpipe.adapters.config import LoraConfig
from meshpipe.checkpoint.chunks import whole
from meshpipe.errors import ArgumentError
from meshpipe.files import expanded
from meshpipe.models.model import ModelConfig
from meshpipe.weights.errors import WeightsError, listed
from meshpipe.weights.fields import Fields
from meshpipe.weights.peft import CONFIG, FACTORS, TENSORS, PeftModule, modules_of, targets, tensor_name
from meshpipe.weights.tensor_file import Tensor, middle_bytes, read_header, read_part

_DTYPES = ("float32", "bfloat16", "float16")


def is_adapters(folder: Path) -> bool:
    """Whether a folder has adapters of PEFT, and not the weights below them."""
    return (folder / CONFIG).is_file() and {file.name for file in folder.glob("*.safetensors")} <= {TENSORS}


def base_of_adapters(folder: Path, asked: str | Path | None, argument: str) -> Path:
    """The folder of the weights below adapters: the one that was asked for, or that adapter_config.json names. Raises
    `ArgumentError` when that is no folder here.
    """
    named = Fields.of_file(folder / CONFIG).values.get("base_model_name_or_path")
    name = str(asked) if asked is not None else named
    if isinstance(name, str) and name:
        places = (expanded(argument, name), *([folder / name] if asked is None else []))
        for place in places:
            if (place / "config.json").is_file() and not is_adapters(place):
                return place
    raise ArgumentError(
        "Adapters need the weights that they were trained upon, a folder with config.json and files of safetensors. "
        f"Got {name!r:.100} for those of {folder}, which is no such folder. Pass that folder as `{argument}`."
    )


@dataclass(frozen=True)
class _Factor:
    """A leaf, and the tensor that it is all of, or the outputs of one of several parts of."""

    name: str
    tensor: Tensor
    module: PeftModule
    is_a: bool


class PeftAdapters:
    """The adapters in a folder with adapter_config.json and adapter_model.safetensors, for a model.

    Raises `WeightsError` when they compute something else than adapters here, or belong to another model.
    """

    def __init__(self, folder: Path, model: ModelConfig) -> None:
        self.folder = folder
        fields = Fields.of_file(folder / CONFIG)
        self._rank = _checked(fields)
        self._tensors = read_header(folder / TENSORS)
        self._factors = _factors(folder, self._tensors, model)
        self.leaves = frozenset(self._factors)
        """The paths of the leaves of all adapters."""
        adapted = {path.rsplit("/", 2)[0] for path in self._factors}
        self.lora = LoraConfig(
            rank=self._rank,
            alpha=float(fields.number("lora_alpha", 8)),
            targets=targets(model, adapted),
            dropout=float(fields.number("lora_dropout", 0.0)),
            rank_stabilised=fields.flag("use_rslora", False),
        )

    @property
    def outline(self) -> dict[str, Any]:
        """What there is, and a few bytes of each tensor, for processes to compare."""
        return {name: [str(t), t.offset, middle_bytes(t).hex()] for name, t in self._tensors.items()}

    def check(self, leaves: Mapping[str, Any]) -> None:
        """Raises `WeightsError` unless these leaves, which have shapes, are the adapters, in their shapes."""
        if strange := sorted(self.leaves.symmetric_difference(leaves)):
            raise WeightsError(
                f"The adapters of a folder must be those of the run. Got {self.folder}, and they differ in "
                f"{listed(strange)}. {self.flags()}"
            )
        for path, leaf in leaves.items():
            self._check_shape(path, leaf.shape)

    def flags(self) -> str:
        """What a run needs to go on with them, in words."""
        lora = self.lora
        more = (
            f", `lora.dropout` {lora.dropout}" * bool(lora.dropout) + ", `lora.rank_stabilised`" * lora.rank_stabilised
        )
        return (
            f"They need `lora.rank` {lora.rank}, `lora.alpha` {lora.alpha:g}, `lora.targets` {' '.join(lora.targets)}"
            f"{more}."
        )

    def value(self, path: str, shape: tuple[int, ...]) -> np.ndarray:
        """A leaf in float32."""
        self._check_shape(path, shape)
        factor = self._factors[path]
        tensor = factor.tensor
        part = list(whole(tensor.shape))
        if not factor.is_a:
            size = tensor.shape[0] // factor.module.parts
            part[0] = slice(factor.module.part * size, (factor.module.part + 1) * size)
        return read_part(tensor, tensor.shape, tuple(part)).astype(np.float32).T.reshape(shape)

    def read(self, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
        """The leaves `wanted`, with their shardings; those without a device in this process are left out."""
        found: dict[str, jax.Array] = {}
        for path, leaf in wanted.items():
            assert leaf.sharding is not None
            if leaf.sharding.addressable_devices:
                value = self.value(path, leaf.shape).astype(leaf.dtype)
                found[path] = jax.make_array_from_callback(leaf.shape, leaf.sharding, value.__getitem__)
        return found

    def _check_shape(self, path: str, shape: tuple[int, ...]) -> None:
        factor = self._factors[path]
        size = int(np.prod(shape)) // self._rank
        expected = (self._rank, size) if factor.is_a else (size * factor.module.parts, self._rank)
        if factor.tensor.shape != expected or str(factor.tensor.dtype) not in _DTYPES:
            raise WeightsError(
                f"{factor.name} must have the shape {list(expected)}, of rank {self._rank} and its module, and be one "
                f"of {', '.join(_DTYPES)}. Got {factor.tensor} in {factor.tensor.file}. Name the right base."
            )


def _checked(fields: Fields) -> int:
    """The rank. Raises `WeightsError` for adapters that compute something else."""
    fields.must_be("peft_type", "LORA")
    fields.must_be("bias", "none")
    for name in ("use_dora", "lora_bias"):
        fields.must_be(name, False)
    for name in ("rank_pattern", "alpha_pattern", "modules_to_save", "trainable_token_indices", "layer_replication"):
        if fields.values.get(name):
            raise WeightsError(
                f"Adapters have one rank and one scale here, and nothing beside them. Got `{name}` of {fields.place}, "
                f"{fields.values[name]!r:.80}. Merge the adapters with PEFT (merge_and_unload), and import the weights."
            )
    return fields.size("r")


def _factors(folder: Path, tensors: Mapping[str, Tensor], model: ModelConfig) -> dict[str, _Factor]:
    """By leaf path, the tensors. Raises `WeightsError` for missing ones, and for those of no module."""
    found = {
        f"{path}/{leaf}": _Factor(name, tensors[name], module, factor == "lora_A")
        for path, module in modules_of(model).items()
        for factor, leaf in FACTORS.items()
        if (name := tensor_name(module.name, factor)) in tensors
    }
    if strange := sorted(tensors.keys() - {factor.name for factor in found.values()}):
        raise WeightsError(
            f"Adapters are read for the linear modules of a model. Got {listed(strange)} in {folder}, which has no "
            "place in the model. Name the right base, or merge the adapters with PEFT (merge_and_unload), and import "
            "the weights."
        )
    other = {name.replace(".lora_A.", ".lora_B.") for name in tensors if ".lora_A." in name}
    other |= {name.replace(".lora_B.", ".lora_A.") for name in tensors if ".lora_B." in name}
    if missing := sorted(other - tensors.keys()):
        raise WeightsError(f"Each adapter must have its lora_A and lora_B. Got {folder}, without {missing[0]}.")
    if not tensors:
        raise WeightsError(f"A folder of adapters must have some. Got {folder / TENSORS}, which has no tensors.")
    return found
