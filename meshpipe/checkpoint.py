"""Checkpoints on disk: one Orbax item per stage, every leaf found by its path."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Where and how often a run saves, and whether it goes on from what was saved."""

    checkpoint_dir: str | None = None
    """Folder of the checkpoints, made when missing; None saves nothing."""
    checkpoint_every: int = 0
    """Updates between saves; 0 saves only at the end. The end of a run is always saved when there is a folder."""
    checkpoint_keep: int = 3
    """Newest checkpoints kept; older ones are removed after a save. 0 keeps all."""
    resume: bool = False
    """Go on from the newest checkpoint of the folder; an error when there is none."""

    def __post_init__(self) -> None:
        for name in ("checkpoint_every", "checkpoint_keep"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 0. Got {getattr(self, name)}.")
        if self.checkpoint_dir is None:
            for name, asked in (("--resume", self.resume), ("--checkpoint-every", self.checkpoint_every > 0)):
                if asked:
                    raise ValueError(f"{name} needs a folder of checkpoints. Got none: add --checkpoint-dir DIR.")
        elif not self.checkpoint_dir.strip():
            raise ValueError("--checkpoint-dir must name a folder. Got an empty name.")
