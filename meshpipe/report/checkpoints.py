"""Tables of saved checkpoints."""

import json
from collections.abc import Sequence
from datetime import datetime
from typing import Any

import ml_dtypes  # noqa: F401  so that NumPy knows bfloat16 and the like by name
import numpy as np
from rich.console import Console
from rich.text import Text

from meshpipe.checkpoint import CheckpointInfo
from meshpipe.checkpoint.base import BASE, base_of
from meshpipe.report.columns import Columns
from meshpipe.report.tables import format_bytes, make_table

AXES = ("pipeline", "data", "tensor")
"""Of the mesh, whose own module would import JAX."""


def checkpoint_table(checkpoints: Sequence[CheckpointInfo]) -> Columns:
    """One row per checkpoint: step, size, time, and the layout that it was saved from, as
    pipeline x data x tensor; `trained alone` where it leaves out what was not trained.
    """
    names = ("step", "bytes", "saved", "recipe", "layout")
    table = make_table(*names, right=("step", "bytes"), wrap=names[-1:])
    for info in checkpoints:
        recipe = _plain(info.metadata.get("recipe", ""))
        partial = "; trained alone" if BASE in info.metadata else ""
        layout = _plain(_layout(info, named=False) + partial)
        table.add_row(str(info.step), format_bytes(info.bytes), _time(info), recipe, layout)
    return table


def print_checkpoint(console: Console, info: CheckpointInfo) -> None:
    """What a checkpoint says about its run, and one row per leaf."""
    console.print(f"step {info.step}, {format_bytes(info.bytes)}, saved {_time(info)}")
    console.print(_plain(f"layout: {_layout(info)}"))
    base = base_of(info.metadata)
    if base is not None:
        console.print(_plain(f"holds what was trained, without its {base}"))
    for name, value in info.metadata.items():
        if name not in ("step", "layout"):
            console.print(_plain(f"{name}: {json.dumps(value)}"))
    table = make_table("leaf", "saved by", "dtype", "shape", "bytes", right=("bytes",))
    for path, leaf in info.leaves.items():
        size = int(np.prod(leaf["shape"], dtype=np.int64)) * np.dtype(leaf["dtype"]).itemsize
        shape = " x ".join(map(str, leaf["shape"])) or "scalar"
        table.add_row(_plain(path), leaf["item"], leaf["dtype"], shape, format_bytes(size))
    console.print()
    console.print(table)


def _layout(info: CheckpointInfo, named: bool = True) -> str:
    """`pipeline 2 x data 1 x tensor 1, 1f1b`, as far as the saver told; without names, `2 x 1 x 1, 1f1b`."""
    layout = info.metadata.get("layout")
    if not isinstance(layout, dict):
        return ""
    sizes = " x ".join(f"{axis} {layout[axis]}" if named else str(layout[axis]) for axis in AXES if axis in layout)
    return ", ".join(str(part) for part in (sizes, layout.get("schedule")) if part)


def _time(info: CheckpointInfo) -> str:
    try:
        return datetime.fromtimestamp(info.saved_at).isoformat(" ", "seconds")
    except (OSError, OverflowError, ValueError):  # files can have times that calendars do not
        return "?"


def _plain(text: Any) -> Text:
    """Text from a file, made safe to print: without markup, and without control characters."""
    return Text("".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text)))
