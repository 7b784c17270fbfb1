"""The tensors of a folder: in one file of safetensors, or in several with an index."""

from pathlib import Path
from typing import Any

from meshpipe.documents import DamagedFileError, load_json
from meshpipe.weights.errors import WeightsError, listed
from meshpipe.weights.tensor_file import Tensor, middle_bytes, read_header

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_OTHER_FORMATS = ("pytorch_model.bin", "pytorch_model.bin.index.json", "tf_model.h5", "flax_model.msgpack")


def find_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors by name; only headers are read. Raises `WeightsError` when a file is missing or damaged."""
    if (folder / SINGLE).exists():
        return read_header(folder / SINGLE)
    if (folder / INDEX).exists():
        return _indexed(folder)
    files = sorted(folder.glob("*.safetensors"))
    if len(files) == 1:
        return read_header(files[0])
    if files:
        raise WeightsError(
            f"Weights in several files need their index, {INDEX}. Got {folder} with {listed([f.name for f in files])} "
            "and no index. Copy it as well."
        )
    other = next((name for name in _OTHER_FORMATS if (folder / name).exists()), None)
    got = f"which has {other} alone" if other else "which has none"
    raise WeightsError(
        f"Weights are read from files of safetensors ({SINGLE}, or {INDEX} and its files). Got {folder}, {got}. "
        "Download them in that format, or save the model with transformers' save_pretrained."
    )


def _indexed(folder: Path) -> dict[str, Tensor]:
    files = _files_of_index(folder / INDEX)
    missing = sorted({file for file in files.values() if not (folder / file).exists()})
    if missing:
        raise WeightsError(
            f"All files that {INDEX} names must be there. {folder} lacks {listed(missing)}. Download or copy them."
        )
    held = {file: read_header(folder / file) for file in dict.fromkeys(files.values())}
    lost = [name for name, file in files.items() if name not in held[file]]
    if lost:
        raise WeightsError(
            f"Tensors must be in the files in which {INDEX} has them. Got {folder}, where {listed(lost)} are not. "
            "The files belong to different versions: download or copy all of them again."
        )
    found = {name: held[file][name] for name, file in files.items()}
    for tensors in held.values():
        for name, tensor in tensors.items():  # also those that the index leaves out
            _check_same(name, found.setdefault(name, tensor), tensor)
    return found


def _check_same(name: str, first: Tensor, second: Tensor) -> None:
    """Raises `WeightsError` where two files have a tensor of one name with other values."""
    alike = (first.dtype, first.shape) == (second.dtype, second.shape)
    if first.file != second.file and not (alike and middle_bytes(first, 4096) == middle_bytes(second, 4096)):
        raise WeightsError(
            f"A tensor must have one value. Got {name} in {first.file} and another one in {second.file.name}. "
            "The files belong to different versions: download or copy all of them again."
        )


def _files_of_index(index: Path) -> dict[str, str]:
    try:
        document: Any = load_json(index.resolve())  # a link in the cache of a hub
    except DamagedFileError as error:
        raise WeightsError(f"An index of weights must be JSON. Got {index}: it {error}.") from None
    found = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(found, dict) or not all(isinstance(file, str) and _is_plain(file) for file in found.values()):
        raise WeightsError(
            f"An index of weights must have a `weight_map` from tensors to files beside it. Got {index}, which has "
            f"{found!r:.80}."
        )
    return found


def _is_plain(name: str) -> bool:
    """Whether it names a file in the same folder."""
    return name == Path(name).name and name not in ("", ".", "..")
