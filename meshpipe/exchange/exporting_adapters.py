"""`meshpipe weights export --adapters`: the adapters of a checkpoint become a folder that PEFT reads."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from meshpipe.adapters.config import LoraConfig
from meshpipe.checkpoint import list_checkpoints
from meshpipe.checkpoint.base import base_of
from meshpipe.checkpoint.inspection import reader_of
from meshpipe.checkpoint.restore import restore_step
from meshpipe.exchange.dtypes import DTYPES_BY_NAME, DtypeName
from meshpipe.exchange.new_folder import new_folder
from meshpipe.exchange.peft_factors import pattern, peft_factors
from meshpipe.layers.modules import host_device
from meshpipe.models.gpt2 import GPT2Config
from meshpipe.models.model import ModelConfig
from meshpipe.runs.saved_model import saved_lora
from meshpipe.weights.errors import WeightsError
from meshpipe.weights.model_of import saved_model_of
from meshpipe.weights.peft import CONFIG, FACTORS, TENSORS, check_modules, target_modules
from meshpipe.weights.writing import Outline, write_file


def export_adapters(
    directory: str | Path,
    to: str | Path,
    *,
    step: int | None = None,
    base: str | Path | None = None,
    dtype: DtypeName = "auto",
) -> int:
    """Writes the adapters of a checkpoint as PEFT does: adapter_config.json and adapter_model.safetensors. Their base
    is neither read nor written.

    Arguments:
        directory: The folder that a run with adapters saved to, or that `import_weights` made.
        to: A folder that is not there, or is empty.
        step: The step to export; None takes the newest.
        base: The name or folder of the base that PEFT is told; None takes the published weights that the run began
            with, or tells none.
        dtype: The dtype of the tensors; `auto` is that of the run, float32.

    Returns the number of modules with an adapter. Raises `ValueError` when there is no such checkpoint, it has no
    adapters, more than adapters was trained, or PEFT has no such adapter; then nothing is written.
    """
    reader = reader_of(directory)
    step = list_checkpoints(reader.directory)[-1] if step is None else step
    metadata = reader.metadata(step)
    model, lora = saved_model_of(metadata, reader.directory), saved_lora(metadata, reader.directory)
    leaves = {key.removeprefix("params/"): leaf for key, leaf in reader.leaves(step).items() if key[:7] == "params/"}
    ends = tuple(f"/{end}" for end in FACTORS.values())
    factors = {path: leaf for path, leaf in leaves.items() if path.endswith(ends)}
    if not factors or not lora.rank:
        raise WeightsError(
            f"Adapters are exported from a run that trained some, with a `rank` of lora. Got step {step} of "
            f"{reader.directory}, which has none. Export its weights instead."
        )
    _check_base(metadata, sorted(leaves.keys() - factors.keys()), reader.directory)
    adapted = {path.removesuffix(end) for path in factors for end in ends if path.endswith(end)}
    check_modules(model, adapted)
    (tree,) = restore_step(reader, step, [{"params": {path: _on_host(leaf) for path, leaf in factors.items()}}])
    found = peft_factors(model, lora, {path: np.asarray(leaf) for path, leaf in tree["params"].items()})
    outlines = [
        Outline(name, value.shape, DTYPES_BY_NAME.get(dtype, value.dtype))
        for name, value in sorted(found.tensors.items())
    ]
    config = _config(model, lora, target_modules(model, adapted), _base_name(metadata, base))
    config |= {"rank_pattern": pattern(found.rank_pattern), "alpha_pattern": pattern(found.alpha_pattern)}
    with new_folder(to) as folder:
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        write_file(folder / TENSORS, outlines, found.tensors.__getitem__)
    return len(adapted)


def _check_base(metadata: Mapping[str, Any], others: list[str], directory: Path) -> None:
    """Raises `WeightsError` where the base may not be what it was: adapters would not give the same model."""
    config = metadata.get("config")
    trainable = config.get("trainable") if isinstance(config, dict) else None
    got = None
    if base_of(metadata) is not None and others:
        got = f"{others[0]}, which was trained as well"
    elif trainable is not None:
        got = f"a run with `trainable` {trainable!r:.80}"
    if got is not None:
        raise WeightsError(
            f"Adapters alone are exported where nothing else was trained. Got {got}, in {directory}. Export the "
            "weights with the adapters merged into them."
        )


def _on_host(leaf: Mapping[str, Any]) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf["shape"], leaf["dtype"], sharding=SingleDeviceSharding(host_device()))


def _base_name(metadata: Mapping[str, Any], asked: str | Path | None) -> str | None:
    if asked is not None:
        return str(asked)
    base = base_of(metadata)
    if base is not None:
        return base.folder if base.step is None else None
    imported = metadata.get("imported_from")
    return imported if isinstance(imported, str) else None


def _config(model: ModelConfig, lora: LoraConfig, names: list[str], base: str | None) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
        "lora_dropout": lora.dropout,
        "use_rslora": lora.rank_stabilised,
        "target_modules": names,
        "bias": "none",
        # The kernels of GPT-2 are [inputs, outputs] in transformers.
        "fan_in_fan_out": isinstance(model, GPT2Config),
    }
