"""What is known of saved checkpoints, as tables."""

import json
from collections.abc import Sequence
from datetime import datetime
from typing import Any

import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from meshpipe.checkpoint import CheckpointInfo
from meshpipe.report.tables import format_bytes, make_table


def checkpoint_table(checkpoints: Sequence[CheckpointInfo]) -> Table:
    """A row a checkpoint: its step, size, time, and the layout it was saved from."""
    table = make_table("step", "bytes", "saved", "recipe", "layout", right=("step", "bytes"))
    for info in checkpoints:
        recipe = str(info.metadata.get("recipe", ""))
        table.add_row(str(info.step), format_bytes(info.bytes), _time(info), recipe, _layout(info))
    return table


def print_checkpoint(console: Console, info: CheckpointInfo) -> None:
    """What a checkpoint says of its run, and a row for each of its leaves."""
    console.print(f"step {info.step}, {format_bytes(info.bytes)}, saved {_time(info)}")
    console.print(f"layout: {_layout(info)}")
    for name, value in info.metadata.items():
        if name not in ("step", "layout"):
            console.print(f"{name}: {json.dumps(value)}", markup=False)
    table = make_table("leaf", "saved by", "dtype", "shape", "bytes", right=("bytes",))
    for path, leaf in info.leaves.items():
        size = int(np.prod(leaf["shape"], dtype=np.int64)) * jnp.dtype(leaf["dtype"]).itemsize
        shape = " x ".join(map(str, leaf["shape"])) or "scalar"
        table.add_row(path, leaf["item"], leaf["dtype"], shape, format_bytes(size))
    console.print()
    console.print(table)


def _layout(info: CheckpointInfo) -> str:
    """`pipeline 2 x data 1 x tensor 1, 1f1b`, as far as the saver told."""
    layout: dict[str, Any] = info.metadata.get("layout") or {}
    sizes = " x ".join(f"{axis} {layout[axis]}" for axis in ("pipeline", "data", "tensor") if axis in layout)
    return ", ".join(filter(None, (sizes, layout.get("schedule"))))


def _time(info: CheckpointInfo) -> str:
    return datetime.fromtimestamp(info.saved_at).isoformat(" ", "seconds")
