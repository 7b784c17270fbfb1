"""Checkpoints in Orbax's format: an item per stage, leaves keyed by path, a step listed only once it is whole."""

from meshpipe.checkpoint.checkpointer import Checkpointer as Checkpointer
from meshpipe.checkpoint.checkpointer import CheckpointWriteError as CheckpointWriteError
from meshpipe.checkpoint.config import CheckpointConfig as CheckpointConfig
from meshpipe.checkpoint.index import CheckpointError as CheckpointError
from meshpipe.checkpoint.inspection import CheckpointInfo as CheckpointInfo
from meshpipe.checkpoint.inspection import describe_checkpoint as describe_checkpoint
from meshpipe.checkpoint.inspection import list_checkpoints as list_checkpoints
from meshpipe.checkpoint.inspection import verify_checkpoint as verify_checkpoint
from meshpipe.checkpoint.lock import FolderInUseError as FolderInUseError
from meshpipe.checkpoint.reader import CheckpointGoneError as CheckpointGoneError
