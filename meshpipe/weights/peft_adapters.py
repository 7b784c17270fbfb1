"""The adapters in a folder of PEFT, by the leaf paths that they have here."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from meshpipe.adapters.groups import spell
from meshpipe.errors import ArgumentError
from meshpipe.files import expanded
from meshpipe.models.model import ModelConfig
from meshpipe.weights.errors import WeightsError, listed
from meshpipe.weights.fields import Fields
from meshpipe.weights.peft import CONFIG, FACTORS, TENSORS, PeftModule, modules_of, tensor_name, text_tensor
from meshpipe.weights.peft_parts import PeftPart, parts_of
from meshpipe.weights.peft_sizes import PeftSizes, lora_of
from meshpipe.weights.tensor_file import Tensor, middle_bytes, read_header


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


class PeftAdapters:
    """The adapters in a folder with adapter_config.json and adapter_model.safetensors, for a model.

    Raises `WeightsError` when they compute something else than adapters here, or belong to another model.
    """

    def __init__(self, folder: Path, model: ModelConfig) -> None:
        self.folder = folder
        fields = Fields.of_file(folder / CONFIG)
        _check(fields)
        self._tensors = {text_tensor(name): tensor for name, tensor in _header(folder).items()}
        sizes, self._parts = PeftSizes(fields), dict[str, PeftPart]()
        for name, modules in _modules(folder, self._tensors, model).items():
            a, b = (self._tensors[tensor_name(name, factor)] for factor in FACTORS)
            self._parts |= parts_of(modules, a, b, sizes.of(name)[0])
        for part in self._parts.values():
            part.check_rank()
        self.modules = tuple(self._parts)
        """The paths of the modules with an adapter."""
        self.leaves = frozenset(f"{path}/{leaf}" for path in self.modules for leaf in FACTORS.values())
        """The paths of the leaves of all adapters."""
        self.lora = lora_of(
            model,
            {path: (part.rank, sizes.alpha_of(part.module.name, part.rank)) for path, part in self._parts.items()},
            sizes,
            fields.number("lora_dropout", 0.0),
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
            part, is_a = self._place(path)
            (part.check_a if is_a else part.check_b)(leaf.shape)

    def flags(self) -> str:
        """What a run needs to go on with them, in words."""
        lora, more = self.lora, ""
        if lora.dropout:
            more += f", `lora.dropout` {lora.dropout}"
        if lora.rank_stabilised:
            more += ", `lora.rank_stabilised`"
        if lora.groups:
            more += f", `lora.groups` {' '.join(map(str, lora.groups))}"
        return (
            f"They need `lora.rank` {lora.rank}, `lora.alpha` {spell(lora.alpha)}, `lora.targets` "
            f"{' '.join(lora.targets or ())}{more}."
        )

    def value(self, path: str, shape: tuple[int, ...]) -> np.ndarray:
        """A leaf in float32."""
        part, is_a = self._place(path)
        return part.value_of_a(shape) if is_a else part.value_of_b(shape)

    def read(self, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
        """The leaves `wanted`, with their shardings; those without a device in this process are left out."""
        found: dict[str, jax.Array] = {}
        for path, leaf in wanted.items():
            assert leaf.sharding is not None
            if leaf.sharding.addressable_devices:
                value = self.value(path, leaf.shape).astype(leaf.dtype)
                found[path] = jax.make_array_from_callback(leaf.shape, leaf.sharding, value.__getitem__)
        return found

    def _place(self, path: str) -> tuple[PeftPart, bool]:
        """The adapter that a leaf is of, and whether it is A."""
        module, leaf = path.rsplit("/", 2)[0], path.split("/")[-1]
        return self._parts[module], leaf == "lora_a"


_OFF = (
    "use_dora",
    "lora_bias",
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "modules_to_save",
    "trainable_token_indices",
    "target_parameters",
    "layer_replication",
)
"""What makes adapters compute something else, or something else be trained as well."""
_OTHER_FORMAT = "adapter_model.bin"
_INITS_OF_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""First values of adapters that are taken out of the weights below them."""


def _check(fields: Fields) -> None:
    """Raises `WeightsError` for adapters that compute something else."""
    fields.must_be("peft_type", "LORA")
    fields.must_be("bias", "none")
    init = fields.values.get("init_lora_weights")
    is_of_base = isinstance(init, str) and init.lower().startswith(_INITS_OF_THE_BASE)
    for name in ("init_lora_weights",) if is_of_base else [name for name in _OFF if fields.values.get(name)]:
        what = "weights as they are, with nothing else changed"
        raise WeightsError(
            f"Adapters are read that are added to {what}. Got `{name}` {fields.values[name]!r:.80} in {fields.place}. "
            "Merge the adapters with PEFT (merge_and_unload), and import the weights."
        )


def _header(folder: Path) -> dict[str, Tensor]:
    if not (folder / TENSORS).is_file() and (folder / _OTHER_FORMAT).is_file():
        raise WeightsError(
            f"Adapters are read from {TENSORS}. Got {folder}, which has {_OTHER_FORMAT} alone. Load them with PEFT, "
            "and save them with its save_pretrained, which writes that format."
        )
    return read_header(folder / TENSORS)


def _modules(folder: Path, tensors: Mapping[str, Tensor], model: ModelConfig) -> dict[str, dict[str, PeftModule]]:
    """By name of each adapted module of transformers, the modules here that it is, by path. Raises `WeightsError` for
    missing tensors, and for those of no module.
    """
    found: dict[str, dict[str, PeftModule]] = {}
    for path, module in modules_of(model).items():
        if any(tensor_name(module.name, factor) in tensors for factor in FACTORS):
            found.setdefault(module.name, {})[path] = module
    known = {tensor_name(name, factor) for name in found for factor in FACTORS}
    if strange := sorted(tensors.keys() - known):
        raise WeightsError(
            f"Adapters are read for the linear modules of a model. Got {listed(strange)} in {folder}, which has no "
            "place in the model. Name the right base, or merge the adapters with PEFT (merge_and_unload), and import "
            "the weights."
        )
    if missing := sorted(known - tensors.keys()):
        raise WeightsError(f"Each adapter must have its lora_A and lora_B. Got {folder}, without {missing[0]}.")
    if not tensors:
        raise WeightsError(f"A folder of adapters must have some. Got {folder / TENSORS}, which has no tensors.")
    return found
