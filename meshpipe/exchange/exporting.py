"""`meshpipe.export_weights`: the weights of a checkpoint become a folder that others read."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import SingleDeviceSharding

from meshpipe.adapters.merge import merge_lora
from meshpipe.checkpoint import list_checkpoints
from meshpipe.checkpoint.base import base_of
from meshpipe.checkpoint.inspection import reader_of
from meshpipe.checkpoint.reader import CheckpointReader
from meshpipe.checkpoint.restore import restore_step
from meshpipe.errors import ArgumentError
from meshpipe.exchange.dtypes import DTYPES_BY_NAME, DtypeName
from meshpipe.exchange.new_folder import new_folder
from meshpipe.files import expanded
from meshpipe.layers.layer import Leaves
from meshpipe.layers.modules import host_device
from meshpipe.layers.shared import FACTORS, variables_of
from meshpipe.loading import load
from meshpipe.models.gpt2 import GPT2Config
from meshpipe.models.model import ModelConfig
from meshpipe.weights.architectures import Table, differences, read_config, table_of, write_config
from meshpipe.weights.companions import companions_of, kept_dtypes
from meshpipe.weights.entry import Entry
from meshpipe.weights.errors import WeightsError
from meshpipe.weights.fields import Fields
from meshpipe.weights.folder import COMPANIONS, CONFIG
from meshpipe.weights.model_of import saved_model_of
from meshpipe.weights.multimodal import text_fields
from meshpipe.weights.tensor_file import DTYPES
from meshpipe.weights.writing import Outline, write_tensors

LARGEST_FILE = 5_000_000_000
"""Bytes of a file of weights."""


def export_weights(
    directory: str | Path,
    to: str | Path,
    *,
    step: int | None = None,
    dtype: DtypeName = "auto",
    like: str | Path | None = None,
    base: str | Path | None = None,
    largest_file: int = LARGEST_FILE,
) -> str:
    """Writes the weights of a checkpoint as a folder that `transformers` loads: config.json, files of safetensors, and
    the tokenizer that the run began with, if it began with published weights. Adapters are merged into their base.

    Leaves are read and written one by one; only with adapters is the whole model in memory.

    Arguments:
        directory: The folder that a run saved to, or that `import_weights` made.
        to: A folder that is not there, or is empty.
        step: The step to export; None takes the newest.
        dtype: The dtype of the tensors. `auto` is that of the published weights that the run began with, or float32.
        like: A folder of published weights whose config.json and tokenizer go with the exported ones; None takes those
            that the run began with. It must describe the model of the checkpoint.
        base: The folder with the base of a checkpoint that holds only what was trained, as for `meshpipe.load`.
        largest_file: Bytes from which on the tensors are cut into several files.

    Returns the dtype of the tensors, for messages. Raises `ValueError` when there is no such checkpoint, or no
    architecture of transformers computes its model; then nothing is written.
    """
    reader = reader_of(directory)
    step = list_checkpoints(reader.directory)[-1] if step is None else step
    metadata = reader.metadata(step)
    model = saved_model_of(metadata, reader.directory)
    table = table_of(model)
    companions = companions_of(reader.directory) if like is None else expanded("like", like)
    if like is not None:
        _check_like(model, expanded("like", like))
    config, dtypes = _config(model, metadata, companions), _dtypes(table, companions, dtype)
    shapes = {key.removeprefix("params/"): tuple(leaf["shape"]) for key, leaf in reader.leaves(step).items()}
    if base_of(metadata) is None and not any(path.endswith(FACTORS) for path in shapes):
        if base is not None:
            raise ArgumentError(f"`base` is for checkpoints of adapters. Got it with {directory}, which has none.")
        read = _reader(reader, step)
    else:
        merged = _merged(reader.directory, step, base)
        shapes, read = {path: tuple(leaf.shape) for path, leaf in merged.items()}, lambda path: np.asarray(merged[path])
    tensors = _tensors(table, shapes, reader.directory)
    names = sorted({str(dtypes[name]) for name in tensors})
    config["torch_dtype" if "dtype" not in config else "dtype"] = names[0] if len(names) == 1 else "float32"
    first = {name: entries[0] for name, entries in tensors.items()}
    outlines = [Outline(name, entry.tensor_shape(shapes[entry.path]), dtypes[name]) for name, entry in first.items()]

    def values(name: str) -> np.ndarray:
        return _joined(tensors[name], read)

    with new_folder(to) as folder:
        _copy_companions(companions, folder)
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        write_tensors(folder, outlines, values, largest_file)
    return ", ".join(names)


def _copy_companions(companions: Path | None, folder: Path) -> None:
    """Copies the tokenizer and its like; config.json is written anew."""
    if companions is None:
        return
    for file in COMPANIONS:
        if (companions / file).is_file() and file != CONFIG:
            shutil.copyfile(companions / file, folder / file)


def _check_like(model: ModelConfig, folder: Path) -> None:
    """Raises `WeightsError` when the folder's config.json describes another model than the checkpoint's."""
    fields = text_fields(Fields.of_file(folder / CONFIG))
    if wrong := differences(model, read_config(fields)):
        raise WeightsError(
            f"The config.json that goes with weights must describe their model. Got {fields.place}: {'; '.join(wrong)}."
        )


def _config(model: ModelConfig, metadata: Mapping[str, Any], companions: Path | None) -> dict[str, Any]:
    """The config.json: that of the published weights if the model is still theirs, or else one made from the model."""
    published = None if companions is None else text_fields(Fields.of_file(companions / CONFIG))
    if published is not None and not differences(model, read_config(published)):
        return dict(published.values)
    made = write_config(model)
    if published is not None:
        kept = {name: published.values[name] for name in _KEPT if name in published.values}
        return {**made, **kept}
    if isinstance(model, GPT2Config):
        return made  # its positions are learned; for transformers, both fields are one
    config = metadata.get("config")
    data = config.get("data") if isinstance(config, dict) else None
    length = data.get("sequence_length") if isinstance(data, dict) else None
    # What transformers takes for the longest text; it is no part of our models.
    return {"max_position_embeddings": length if isinstance(length, int) else 8192, **made}


_KEPT = ("bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings")


def _dtypes(table: Table, companions: Path | None, asked: DtypeName) -> dict[str, Any]:
    names = [entry.name for entry in table.entries]
    if asked != "auto":
        return dict.fromkeys(names, DTYPES_BY_NAME[asked])
    kept = {} if companions is None else kept_dtypes(companions)
    default = DTYPES_BY_NAME["float32"]
    if companions is not None and not kept:
        fields = text_fields(Fields.of_file(companions / CONFIG))
        default = DTYPES_BY_NAME.get(str(fields.values.get("dtype") or fields.values.get("torch_dtype")), default)
    short = {name.removeprefix(table.prefix): value for name, value in kept.items()}
    return {name: DTYPES[short[name.removeprefix(table.prefix)]] if short else default for name in names}


def _reader(reader: CheckpointReader, step: int) -> Callable[[str], np.ndarray]:
    one, leaves = SingleDeviceSharding(host_device()), reader.leaves(step)

    def read(path: str) -> np.ndarray:
        leaf = leaves[f"params/{path}"]
        shape = jax.ShapeDtypeStruct(leaf["shape"], leaf["dtype"], sharding=one)
        (tree,) = restore_step(reader, step, [{"params": {path: shape}}])
        return np.asarray(tree["params"][path])

    return read


def _merged(directory: Path, step: int, base: str | Path | None) -> Leaves:
    """All leaves of a model with its adapters added to their kernels, in float32: they are rounded once, when they are
    written.
    """
    modules = load(directory, layers="recipe", step=step, base=base)
    for module in modules:
        if isinstance(module, nnx.Module):
            nnx.update(module, jax.tree.map(lambda leaf: leaf.astype(np.float32), nnx.state(module, nnx.Param)))
    return {
        path: variable[...]
        for index, module in enumerate(merge_lora(modules))
        for path, variable in variables_of(f"layers/{index}", module).items()
    }


def _tensors(table: Table, shapes: Mapping[str, Any], directory: Path) -> dict[str, list[Entry]]:
    """By name of each tensor, the entries that make it up."""
    missing = sorted(entry.path for entry in table.entries if entry.path not in shapes)
    if missing:
        raise WeightsError(
            f"A checkpoint must have every parameter of its model to be exported. {directory} lacks {missing[0]}."
        )
    found: dict[str, list[Entry]] = {}
    for entry in table.entries:
        found.setdefault(entry.name, []).append(entry)
    return found


def _joined(entries: list[Entry], read: Callable[[str], np.ndarray]) -> np.ndarray:
    """A tensor, of one leaf or of several that are its parts."""
    first = read(entries[0].path)
    seen = np.empty(entries[0].seen_shape(first.shape), first.dtype)
    for entry in entries:
        leaf = first if entry is entries[0] else read(entry.path)
        region = entry.seen_region(tuple(slice(0, size) for size in leaf.shape))
        entry.to_leaf(seen[region])[...] = leaf
    return seen.reshape(entries[0].tensor_shape(first.shape))
