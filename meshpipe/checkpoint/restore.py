"""Restoring the leaves of a step onto the devices that want them."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from meshpipe.checkpoint.arrays import read_leaves
from meshpipe.checkpoint.checksums import differences, size_differences
from meshpipe.checkpoint.index import Tree, check_leaf, with_sharding
from meshpipe.checkpoint.names import DOCUMENT, directory_name, leaf_of
from meshpipe.checkpoint.reader import CheckpointReader, ProblemsError, load_step, sentences


def restore_step(
    reader: CheckpointReader, step: int, abstract: Sequence[Tree], *, converts: bool = False
) -> list[dict[str, dict[str, jax.Array]]]:
    """What `Checkpointer.restore` returns; `converts` is as of `check_leaf`."""
    with reader.reading(step) as folder:
        return _restore(folder, step, abstract, converts)


def restore_or_problems(
    reader: CheckpointReader, step: int, abstract: Sequence[Tree], *, converts: bool = False
) -> tuple[list[dict[str, dict[str, jax.Array]]], list[str]]:
    """What `Checkpointer.restore` returns, or what is wrong with the files that this process reads, a sentence for each
    file, and no arrays. `converts` is as of `check_leaf`.
    """
    try:
        with reader.watching(step) as folder:
            return _restore(folder, step, abstract, converts), []
    except ProblemsError as error:
        return [], sentences(error.problems)


def _restore(
    folder: Path, step: int, abstract: Sequence[Tree], converts: bool = False
) -> list[dict[str, dict[str, jax.Array]]]:
    """Raises `ProblemsError` for files that are damaged."""
    saved = load_step(folder, step)
    leaves = saved.document["leaves"]
    wanted: dict[tuple[int, str], jax.ShapeDtypeStruct] = {}
    for stage, tree in enumerate(abstract):
        for key, leaf in _flat(tree):
            check_leaf(step, key, leaf, leaves, converts=converts)
            shape = with_sharding(leaf)
            if shape.sharding.addressable_devices:
                wanted[stage, key] = shape
    folders = {f"{leaves[key]['item']}/{directory_name(key)}" for _, key in wanted}
    problems = differences(folder, saved.found, saved.files, lambda name: leaf_of(name) is None and name != DOCUMENT)
    problems |= size_differences(saved.found, saved.files, lambda name: name.rpartition("/")[0] in folders)
    arrays: dict[tuple[int, str], jax.Array] = {}
    if not problems:
        arrays, problems = read_leaves(folder, wanted, leaves, saved.files)
    if problems:
        raise ProblemsError(problems)
    return [
        {
            section: {
                path: arrays[stage, f"{section}/{path}"] for path in part if (stage, f"{section}/{path}") in arrays
            }
            for section, part in tree.items()
        }
        for stage, tree in enumerate(abstract)
    ]


def _flat(tree: Tree) -> Iterator[tuple[str, Any]]:
    for section, part in tree.items():
        for path, leaf in part.items():
            yield f"{section}/{path}", leaf
