"""`meshpipe weights import` of adapters: a folder of PEFT and its base become a checkpoint of both."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from meshpipe.adapters.config import LoraConfig
from meshpipe.adapters.lora import with_lora
from meshpipe.checkpoint.chunks import Region, whole
from meshpipe.errors import ArgumentError
from meshpipe.exchange.importing import imported_metadata, save_imported
from meshpipe.exchange.peft import CONFIG, FACTORS, TENSORS, modules_of, targets, tensor_name
from meshpipe.files import expanded
from meshpipe.layers.examine import abstract_layers
from meshpipe.models.model import ModelConfig
from meshpipe.runs.record import config_values
from meshpipe.weights import WeightsError, WeightsFolder, is_published
from meshpipe.weights.fields import Fields
from meshpipe.weights.reading import read_region
from meshpipe.weights.tensor_file import Tensor, read_header, read_part

_DTYPES = ("float32", "bfloat16", "float16")


def import_adapters(folder: str | Path, to: str | Path, *, base: str | Path | None = None) -> LoraConfig:
    """Writes the adapters of a folder of PEFT, and the published weights they belong to, as step 0 of a folder of
    checkpoints. Parameters are float32, so every value is kept.

    Arguments:
        folder: A folder with adapter_config.json and adapter_model.safetensors.
        to: Folder for the checkpoint, made when missing; it must hold none.
        base: The folder of the weights below; None takes `base_model_name_or_path`, where that is a folder.

    Returns the adapters' config, for a run that goes on with them. Raises `WeightsError`, `CheckpointError` or
    `ArgumentError`, all `ValueError`s, when the folder has adapters not computed here; then nothing is written.
    """
    folder = expanded("folder", folder)
    fields = Fields.of_file(folder / CONFIG)
    weights = WeightsFolder(_base(fields, base))
    tensors = read_header(folder / TENSORS)
    rank = _checked(fields)
    found = _factors(folder, tensors, weights.model)
    lora = LoraConfig(
        rank=rank,
        alpha=float(fields.number("lora_alpha", 8)),
        targets=targets(weights.model, {path.rsplit("/", 2)[0] for path in found}),
        dropout=float(fields.number("lora_dropout", 0.0)),
        rank_stabilised=fields.flag("use_rslora", False),
    )
    layers = abstract_layers(with_lora(weights.model.layers(), lora), None)
    shapes = {path: leaf for layer in layers for path, leaf in layer.params.items()}
    below = {path: leaf for path, leaf in shapes.items() if path not in found}
    weights.check(below)
    sources = weights.sources(below)
    values = {
        path: _leaf(name, tensor, rank, shapes[path].shape, path.endswith(FACTORS["lora_A"]))
        for path, (name, tensor) in found.items()
    }

    def read(key: str, part: Region) -> np.ndarray:
        path = key.partition("/")[2]
        return values[path][part] if path in values else read_region(sources[path], shapes[path], part)

    metadata = imported_metadata(weights)
    metadata["config"]["lora"] = config_values(lora)
    save_imported(weights, to, shapes, read, metadata)
    return lora


def _base(fields: Fields, asked: str | Path | None) -> Path:
    name = fields.values.get("base_model_name_or_path") if asked is None else str(asked)
    if isinstance(name, str) and name and is_published(name):
        return expanded("base", name)
    raise ArgumentError(
        "Adapters are imported with the weights that they were trained upon, in a folder with config.json and files of "
        f"safetensors. Got {name!r:.100}, which is none. Pass that folder as `base`."
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


def _factors(folder: Path, tensors: Mapping[str, Tensor], model: ModelConfig) -> dict[str, tuple[str, Tensor]]:
    """By leaf path, the tensors. Raises `WeightsError` for missing ones, and for those of no module."""
    names = {
        tensor_name(module, factor): f"{path}/{leaf}"
        for path, module in modules_of(model).items()
        for factor, leaf in FACTORS.items()
    }
    if strange := sorted(tensors.keys() - names.keys()):
        raise WeightsError(
            "Adapters are read for the linear modules of a model that are one tensor here and there. Got "
            f"{', '.join(strange[:6])} in {folder}, which has no place in the model. Name the right base, or merge the "
            "adapters with PEFT (merge_and_unload), and import the weights."
        )
    other = {name.replace(".lora_A.", ".lora_B.") for name in tensors if ".lora_A." in name}
    other |= {name.replace(".lora_B.", ".lora_A.") for name in tensors if ".lora_B." in name}
    if missing := sorted(other - tensors.keys()):
        raise WeightsError(f"Each adapter must have its lora_A and lora_B. Got {folder}, without {missing[0]}.")
    if not tensors:
        raise WeightsError(f"A folder of adapters must have some. Got {folder / TENSORS}, which has no tensors.")
    return {names[name]: (name, tensor) for name, tensor in tensors.items()}


def _leaf(name: str, tensor: Tensor, rank: int, shape: tuple[int, ...], is_a: bool) -> np.ndarray:
    size = int(np.prod(shape)) // rank
    expected = (rank, size) if is_a else (size, rank)
    if tensor.shape != expected or str(tensor.dtype) not in _DTYPES:
        raise WeightsError(
            f"{name} must have the shape {list(expected)}, of rank {rank} and its module, and be one of "
            f"{', '.join(_DTYPES)}. Got {tensor} in {tensor.file}. Name the right base."
        )
    return read_part(tensor, tensor.shape, whole(tensor.shape)).astype(np.float32).T.reshape(shape)
