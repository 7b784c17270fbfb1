"""The flags of checkpoints."""

from dataclasses import dataclass
from typing import Literal

from meshpipe.errors import ArgumentError, check_whole
from meshpipe.files import expand_fields


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Where and how often a run saves, and whether it continues from what was saved."""

    checkpoint_dir: str | None = None
    """Folder of the checkpoints, made when missing; None saves nothing."""
    checkpoint_every: int = 0
    """Updates between saves; 0 saves only at the end. A run that completes or is stopped is always saved at its end."""
    checkpoint_keep: int = 3
    """Newest checkpoints kept; older ones are removed after a save. 0 keeps all."""
    checkpoint_what: Literal["auto", "all", "trained"] = "auto"
    """Whether a checkpoint holds `all` parameters, or those that are `trained` and, of the others, the digest: then
    resuming and loading take the others from where this run had them, and compare. `auto` is trained for adapters, and
    otherwise all."""
    resume: bool = False
    """Continue from the newest checkpoint of the folder; an error when there is none."""
    resume_from: int | None = None
    """Continue from this checkpoint of the folder. Newer ones are renamed to STEP.superseded once it is restored."""
    auto_resume: bool = False
    """Continue from the newest checkpoint of the folder if there is one, else start from the beginning."""

    init_from: str | None = None
    """Folder with a checkpoint of another run, with published weights (config.json and files of safetensors), or with
    adapters of PEFT, to begin this one from; it is only read. Where a resumed run finds a checkpoint of its own, that
    is taken."""
    init_base: str | None = None
    """Folder of the weights below adapters of PEFT in --init-from; None takes the one that adapter_config.json
    names."""
    init_step: int | None = None
    """The step to take from --init-from; None takes the newest."""
    init_what: Literal["weights", "all"] = "weights"
    """What to take from --init-from: `weights`, parameters and batch statistics, for a new run from step 0; or `all`,
    with optimizer, step and position in the data, to continue that run in another --checkpoint-dir."""

    @property
    def may_continue(self) -> bool:
        """Whether the run may be the continuation of another, to whose files it appends."""
        return self.resume or self.auto_resume or self.resume_from is not None

    def __post_init__(self) -> None:
        for name in ("checkpoint_every", "checkpoint_keep"):
            check_whole(name, getattr(self, name), 0)
        expand_fields(self, "checkpoint_dir", "init_from", "init_base")
        if self.init_step is not None:
            check_whole("init_step", self.init_step, 0)
        if self.init_from is None and (self.init_step is not None or self.init_what != "weights"):
            name = "init_what" if self.init_step is None else "init_step"
            raise ArgumentError(f"`{name}` is for `init_from`. Got it alone. Add `init_from` DIR, or leave it out.")
        if self.init_from is None and self.init_base is not None:
            raise ArgumentError("`init_base` is for `init_from`. Got it alone. Add `init_from` DIR, or leave it out.")
        if self.resume_from is not None:
            check_whole("resume_from", self.resume_from, 0)
        if self.resume_from is not None and (self.resume or self.auto_resume):
            other = "resume" if self.resume else "auto_resume"
            raise ArgumentError(
                f"`resume_from` names a checkpoint, and `{other}` takes the newest. Got both. Leave one of them out."
            )

    def check_folder_given(self) -> None:
        """Raises `ArgumentError` when something needs a folder of checkpoints, and there is none."""
        if self.checkpoint_dir is None:
            asked = {
                "resume": self.resume,
                "resume_from": self.resume_from is not None,
                "auto_resume": self.auto_resume,
                "checkpoint_every": self.checkpoint_every > 0,
            }
            for name in (name for name, is_asked in asked.items() if is_asked):
                raise ArgumentError(
                    f"`{name}` needs a folder of checkpoints. Got none: add `checkpoint_dir` DIR, or `run_dir` DIR."
                )
