"""Checkpoints in Orbax's format: an item per stage, leaves keyed by path, a step listed only once it is whole."""

# Every name is imported at its first use: to look at checkpoints needs no JAX.
from typing import TYPE_CHECKING

from meshpipe.lazy import importing

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
    "Checkpointer": "meshpipe.checkpoint.checkpointer",
    "CheckpointWriteError": "meshpipe.checkpoint.checkpointer",
    "CheckpointConfig": "meshpipe.checkpoint.config",
    "CheckpointError": "meshpipe.checkpoint.errors",
    "CheckpointGoneError": "meshpipe.checkpoint.errors",
    "CheckpointInfo": "meshpipe.checkpoint.inspection",
    "describe_checkpoint": "meshpipe.checkpoint.inspection",
    "list_checkpoints": "meshpipe.checkpoint.inspection",
    "verify_checkpoint": "meshpipe.checkpoint.inspection",
    "FolderInUseError": "meshpipe.checkpoint.lock",
}
"""By name, the module that has it."""

__all__ = sorted(_MODULES)
__getattr__, __dir__ = importing(globals(), _MODULES)
