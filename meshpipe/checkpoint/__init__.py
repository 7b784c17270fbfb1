"""Checkpoints in Orbax's format: an item per stage, leaves keyed by path, a step listed only once it is whole."""

# As in meshpipe/__init__.py, every name is imported at its first use: to look at checkpoints needs no JAX.
import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from meshpipe.checkpoint.checkpointer import Checkpointer as Checkpointer
    from meshpipe.checkpoint.checkpointer import CheckpointWriteError as CheckpointWriteError
    from meshpipe.checkpoint.config import CheckpointConfig as CheckpointConfig
    from meshpipe.checkpoint.errors import CheckpointError as CheckpointError
    from meshpipe.checkpoint.errors import CheckpointGoneError as CheckpointGoneError
    from meshpipe.checkpoint.inspection import CheckpointInfo as CheckpointInfo
    from meshpipe.checkpoint.inspection import describe_checkpoint as describe_checkpoint
    from meshpipe.checkpoint.inspection import list_checkpoints as list_checkpoints
    from meshpipe.checkpoint.inspection import verify_checkpoint as verify_checkpoint
    from meshpipe.checkpoint.lock import FolderInUseError as FolderInUseError

_MODULES = {
    "Checkpointer": "checkpointer",
    "CheckpointWriteError": "checkpointer",
    "CheckpointConfig": "config",
    "CheckpointError": "errors",
    "CheckpointGoneError": "errors",
    "CheckpointInfo": "inspection",
    "describe_checkpoint": "inspection",
    "list_checkpoints": "inspection",
    "verify_checkpoint": "inspection",
    "FolderInUseError": "lock",
}
"""By name, the file that has it."""

__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
