"""Checkpoints by Orbax alone: read as whoever has no meshpipe reads them, written as earlier versions of it had them
written.
"""

import json
from pathlib import Path

import jax
import orbax.checkpoint as ocp
from damage import remake_checksums
from etils import epath

from meshpipe.checkpoint.index import index_leaves
from meshpipe.checkpoint.names import directory_name


def restore_item(item: Path, wanted: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """The leaves of one stage, by the names of their folders."""
    arguments = ocp.args.PyTreeRestore(item=wanted, restore_args=ocp.checkpoint_utils.construct_restore_args(wanted))
    return ocp.PyTreeCheckpointHandler().restore(epath.Path(item), args=arguments)


def save(step: Path, trees, metadata, *, with_chunks: bool) -> None:
    """A step as earlier versions saved it; those before several processes were known did not note the chunks."""
    index, items = index_leaves(trees)
    if not with_chunks:
        for leaf in index.values():
            del leaf["chunks"]
    arrays = ocp.type_handlers.ArrayHandler(
        use_replica_parallel=False, array_metadata_store=None, enable_write_sharding_file=False
    )
    handler = ocp.PyTreeCheckpointHandler(
        use_ocdbt=False,
        use_compression=False,
        type_handler_registry=ocp.type_handlers.create_type_handler_registry((jax.Array, arrays)),
    )
    composite = ocp.CompositeCheckpointHandler(**dict.fromkeys(items, handler), meta=ocp.JsonCheckpointHandler())
    document = {"format": 1, "step": int(step.name), "user": metadata, "leaves": index, "stages": len(trees)}
    with ocp.Checkpointer(composite) as checkpointer:
        named = {
            item: ocp.args.PyTreeSave({directory_name(key): leaf for key, leaf in leaves.items()})
            for item, leaves in items.items()
        }
        checkpointer.save(epath.Path(step), args=ocp.args.Composite(**named, meta=ocp.args.JsonSave(document)))
    assert json.loads((step / "meta" / "metadata").read_text()) == document
    remake_checksums(step)
