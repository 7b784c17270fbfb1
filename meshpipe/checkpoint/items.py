"""What Orbax does for checkpoints: the one place that says which process writes and reads which arrays, and how."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

META = "meta"
"""Name of the item that holds the JSON document."""


def open_orbax(items: tuple[str, ...]) -> ocp.AsyncCheckpointer:
    """A writer of checkpoints that consist of these items of arrays and the document."""
    options = ocp.AsyncOptions(create_directories_asynchronously=False)
    handler = ocp.CompositeCheckpointHandler(
        composite_options=ocp.CompositeOptions(async_options=options),
        **{item: _arrays_handler() for item in items},
        **{META: ocp.JsonCheckpointHandler()},
    )
    return ocp.AsyncCheckpointer(handler, async_options=options)


def start_save(
    orbax: ocp.AsyncCheckpointer,
    folder: Path,
    items: Mapping[str, Mapping[str, jax.Array]],
    document: Mapping[str, Any],
) -> None:
    """Takes hold of the arrays of each item, by leaf, and writes them into the folder in the background."""
    arrays = {
        name: ocp.args.PyTreeSave({directory_name(key): leaf for key, leaf in item.items()})
        for name, item in items.items()
    }
    orbax.save(epath.Path(folder), args=ocp.args.Composite(**arrays, **{META: ocp.args.JsonSave(dict(document))}))


def read_document(folder: Path) -> Any:
    return ocp.JsonCheckpointHandler().restore(epath.Path(folder / META))


def read_arrays(item: Path, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """Reads some leaves of an item with their shardings. Their shapes and dtypes must be the saved ones: Orbax casts
    silently, and returns what it does not find as it was given.
    """
    tree = {directory_name(key): shape for key, shape in wanted.items() if shape.size}
    arguments = ocp.args.PyTreeRestore(
        item=tree, restore_args=ocp.checkpoint_utils.construct_restore_args(tree), partial_restore=True
    )
    found = _arrays_handler().restore(epath.Path(item), args=arguments) if tree else {}
    # Orbax saves no array without elements.
    empty = {
        key: jax.device_put(np.zeros(shape.shape, shape.dtype), shape.sharding)
        for key, shape in wanted.items()
        if not shape.size
    }
    arrays = {key: empty[key] if key in empty else found[directory_name(key)] for key in wanted}
    assert all(isinstance(array, jax.Array) for array in arrays.values())
    return arrays


def directory_name(key: str) -> str:
    """The name of a leaf's folder: `params/layers/0/kernel` is in `params.layers.0.kernel`.

    Orbax takes "/" for levels of folders.
    """
    return key.replace("%", "%25").replace(".", "%2E").replace("/", ".")


def leaf_of(name: str) -> str | None:
    """The leaf that a file of a checkpoint belongs to, from the file's name; None for files of no leaf."""
    parts = name.split("/")
    if len(parts) < 3 or not parts[0].startswith("stage_"):
        return None
    return parts[1].replace(".", "/").replace("%2E", ".").replace("%25", "%")


@contextmanager
def quiet_orbax() -> Iterator[None]:
    """Keeps to itself what Orbax logs; its errors are raised as well. Whoever sets absl's logger to INFO sees all."""
    logger = logging.getLogger("absl")
    if logger.isEnabledFor(logging.INFO):
        yield
        return

    def keep(record: logging.LogRecord) -> bool:
        return "orbax" not in record.pathname

    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)


def _arrays_handler() -> ocp.PyTreeCheckpointHandler:
    """A folder for each leaf and a file for each of its shards, uncompressed, written by its first replica.

    So a checksum is one of a single leaf, and restoring some leaves reads only theirs. Compression makes random weights
    8 % smaller and saving several times slower. Splitting the writing among replicas compiles programs at the first
    save. Orbax's database of few large files is no faster, but for models of many tiny leaves.
    """
    arrays = ocp.type_handlers.ArrayHandler(
        use_replica_parallel=False, array_metadata_store=None, enable_write_sharding_file=False
    )
    registry = ocp.type_handlers.create_type_handler_registry((jax.Array, arrays))
    return ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_compression=False, type_handler_registry=registry)
