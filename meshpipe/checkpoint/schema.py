"""What the document of a step must be, checked before anything of it is used: it is data that anybody may have written.

Types, ranges, and that the files that follow from it are the files that the list of checksums has.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import ml_dtypes  # noqa: F401  so that NumPy knows bfloat16 and the like by name
import numpy as np

from meshpipe.checkpoint.checksums import Checksums
from meshpipe.checkpoint.chunks import chunk_count, chunks_in, whole
from meshpipe.checkpoint.names import ZARRAY, directory_name, name_problem
from meshpipe.documents import is_count

FORMAT = 1
_LARGEST = 1 << 63
"""No array has as many bytes."""
_REGISTERED = 2
"""What `dtype.isbuiltin` is for types that a package has added to NumPy, here the numbers of ml_dtypes."""


class SchemaError(ValueError):
    """A document is not as this version writes it; the message says what, as the end of a sentence."""


def check_document(document: Any, files: Checksums) -> None:
    """Raises `SchemaError` unless the document is one that this version, or one before it, has written beside these
    files.
    """
    _require(isinstance(document, dict), "it is no JSON object")
    _require(document.get("format") == FORMAT, f"its format is {document.get('format')!r:.40}, not {FORMAT}")
    _require(is_count(document.get("step")), "its step is no whole number from 0")
    _require(isinstance(document.get("user"), dict), "it has no metadata")
    leaves = document.get("leaves")
    _require(isinstance(leaves, dict), "it has no leaves")
    assert isinstance(leaves, dict)
    sizes: dict[str, dict[str, int]] = {}
    for name, (size, _) in files.items():
        folder, _, file = name.rpartition("/")
        sizes.setdefault(folder, {})[file] = size
    for key, leaf in leaves.items():
        problem = name_problem(key)
        _require(problem is None, f"the path of a leaf {problem}")
        _check_leaf(f"leaf {key:.100}", leaf)
        _check_sizes(f"leaf {key:.100}", leaf, sizes.get(f"{leaf['item']}/{directory_name(key)}", {}))


def check_zarray(description: Any, leaf: Mapping[str, Any]) -> list[int]:
    """The chunks that Zarr's description of a leaf gives. Raises `SchemaError` unless it is an array of the leaf's
    shape and dtype as `zarray` describes it.
    """
    _require(isinstance(description, dict), "it is no JSON object")
    chunks = description.get("chunks")
    _require(_are_chunks(chunks, leaf["shape"]), "its chunks do not fit the shape of the leaf")
    expected = zarray(leaf["shape"], leaf["dtype"], chunks)
    for name, value in expected.items():
        if name not in ("fill_value", "dimension_separator"):
            _require(description.get(name) == value, f"its {name} does not fit the leaf")
    _require(description.get("dimension_separator", ".") == ".", "its chunks have other names")
    return chunks


def zarray(shape: Any, dtype: Any, chunks: Any) -> dict[str, Any]:
    """Zarr's description, of version 2, of an uncompressed array."""
    kind = np.dtype(dtype)
    return {
        "chunks": list(chunks),
        "compressor": None,
        "dimension_separator": ".",
        # Types that NumPy does not have, such as bfloat16, go by their names.
        "dtype": kind.str if kind.isbuiltin == 1 else kind.name,
        "fill_value": None,
        "filters": None,
        "order": "C",
        "shape": list(shape),
        "zarr_format": 2,
    }


def _check_leaf(what: str, leaf: Any) -> None:
    _require(isinstance(leaf, dict), f"{what} is no JSON object")
    item, shape, dtype = leaf.get("item"), leaf.get("shape"), leaf.get("dtype")
    _require(isinstance(item, str) and bool(re.fullmatch("stage_(0|[1-9][0-9]{0,8})", item)), f"{what} is in no item")
    _require(isinstance(dtype, str) and _is_number(dtype), f"{what} has a dtype that no array has")
    assert isinstance(dtype, str)
    known = isinstance(shape, list) and len(shape) <= 64 and all(is_count(size) for size in shape)
    _require(known and math.prod(shape) * np.dtype(dtype).itemsize < _LARGEST, f"{what} has a shape that no array has")
    _require("chunks" not in leaf or _are_chunks(leaf["chunks"], shape), f"{what} has chunks that do not fit its shape")


def _check_sizes(what: str, leaf: Mapping[str, Any], sizes: Mapping[str, int]) -> None:
    """Whether the files of a leaf are those that its shape asks for; checkpoints of earlier versions do not say how it
    was cut.
    """
    shape, chunks = leaf["shape"], leaf.get("chunks")
    if 0 in shape:
        _require(not sizes, f"{what} has files, and no elements")
        return
    _require(ZARRAY in sizes, f"{what} has no {ZARRAY}")
    if chunks is None:
        return
    # Counted before they are named: a forged shape must not make a list of a billion names.
    _require(chunk_count(shape, chunks) == len(sizes) - 1, f"{what} has not as many files as its shape asks for")
    bytes_of_each = math.prod(chunks) * np.dtype(leaf["dtype"]).itemsize
    for name, _ in chunks_in(whole(shape), shape, chunks):
        _require(sizes.get(name) == bytes_of_each, f"{what} has files of other sizes than its shape asks for")


def _are_chunks(chunks: Any, shape: list[int]) -> bool:
    return (
        isinstance(chunks, list)
        and len(chunks) == len(shape)
        and all(is_count(c) and min(1, size) <= c <= size for c, size in zip(chunks, shape, strict=True))
    )


def _is_number(dtype: str) -> bool:
    try:
        kind = np.dtype(dtype)
    except (TypeError, ValueError, SyntaxError):
        return False
    plain = kind.name == dtype and kind.subdtype is None and kind.names is None and kind.kind not in "mMOSU"
    return plain and (kind == np.bool_ or np.issubdtype(kind, np.number) or kind.isbuiltin == _REGISTERED)


def _require(right: bool, otherwise: str) -> None:
    if not right:
        raise SchemaError(otherwise)
