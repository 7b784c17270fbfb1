"""The small files that go with published weights, kept beside the checkpoints that began with them."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from meshpipe.documents import DamagedFileError, load_json
from meshpipe.weights.errors import WeightsError
from meshpipe.weights.folder import COMPANIONS, CONFIG, WeightsFolder
from meshpipe.weights.tensor_file import DTYPES

PRETRAINED = "pretrained"
"""The folder, among those of steps, that has the config.json, the tokenizer and so on."""
_DTYPES = "dtypes.json"
"""The dtype of each tensor, in the terms of safetensors."""


def keep_companions(source: Path | WeightsFolder, checkpoints: Path) -> None:
    """Copies what goes with the weights, of a folder of weights or of checkpoints, to a folder of checkpoints."""
    target = checkpoints / PRETRAINED
    if isinstance(source, WeightsFolder):
        _copy(source.folder, target)
        names = {dtype: name for name, dtype in DTYPES.items()}
        dtypes = {name: names[tensor.dtype] for name, tensor in source.tensors.items()}
        (target / _DTYPES).write_text(json.dumps(dtypes, indent=1) + "\n")
    elif (source / PRETRAINED).is_dir() and source.absolute() != checkpoints.absolute():
        _copy(source / PRETRAINED, target)
        if (source / PRETRAINED / _DTYPES).is_file():
            shutil.copyfile(source / PRETRAINED / _DTYPES, target / _DTYPES)


def _copy(source: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for name in COMPANIONS:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def companions_of(checkpoints: Path) -> Path | None:
    """Where they are, if there are any."""
    folder = checkpoints / PRETRAINED
    return folder if (folder / CONFIG).is_file() else None


def kept_dtypes(folder: Path) -> Mapping[str, str]:
    """The dtypes that the tensors of the published weights had, by name; none where that is not known."""
    try:
        found = load_json(folder / _DTYPES)
    except FileNotFoundError:
        return {}
    except DamagedFileError as error:
        raise WeightsError(f"{folder / _DTYPES} must be JSON: it {error}. Remove it, and name a dtype.") from None
    if not isinstance(found, dict) or not all(value in DTYPES for value in map(str, found.values())):
        raise WeightsError(f"{folder / _DTYPES} must have a dtype for each tensor. Remove it, and name a dtype.")
    return found
