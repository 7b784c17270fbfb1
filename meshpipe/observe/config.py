"""What to observe of a run, and where that goes."""

import re
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from meshpipe.errors import ArgumentError
from meshpipe.files import expand_fields

STEP_LIMIT = 2**31
"""Steps of `profile_steps` are below this."""


@dataclass(frozen=True, kw_only=True)
class ObserveConfig:
    """Trackers of the metrics, and the profiler."""

    track: Annotated[tuple[Literal["tensorboard", "wandb"], ...], tyro.conf.UseAppendAction] = ()
    """Send the metrics to this tracker as well; may be repeated. `tensorboard` writes event files. `wandb` starts a run
    of Weights & Biases, whose environment variables apply, such as WANDB_PROJECT and WANDB_MODE=offline."""
    track_dir: str | None = None
    """Folder for the files of trackers; None takes --run-dir."""
    profile_steps: str | None = None
    """Steps that JAX's profiler records: `10:13` records steps 10, 11 and 12, as a Python slice does. None records
    nothing."""
    profile_dir: str | None = None
    """Folder for the profile, which TensorBoard's profile plugin and XProf read; None takes `profile` in --run-dir."""

    def __post_init__(self) -> None:
        expand_fields(self, "track_dir", "profile_dir")
        object.__setattr__(self, "track", tuple(dict.fromkeys(self.track)))
        if self.track_dir is not None and not self.track:
            raise ArgumentError(f"`track_dir` is for `track`. Got {self.track_dir!r} alone. Add `track` tensorboard.")
        if self.profile_dir is not None and self.profile_steps is None:
            raise ArgumentError(
                f"`profile_dir` is for `profile_steps`. Got {self.profile_dir!r} alone. Add `profile_steps` 10:13."
            )
        _ = self.profile_window

    @property
    def profile_window(self) -> range | None:
        """The steps to profile. Raises `ArgumentError` for a text that is no range of steps."""
        text = self.profile_steps
        if text is None:
            return None
        match = re.fullmatch(r"([0-9]{1,10}):([0-9]{1,10})", text) if isinstance(text, str) else None
        first, end = (int(match[1]), int(match[2])) if match else (0, 0)
        if not 1 <= first < end <= STEP_LIMIT:
            raise ArgumentError(
                "`profile_steps` must be FIRST:END, the first step to record, from 1, and a later one at which to "
                f"stop, e.g. 10:13 for steps 10 to 12. Got {text!r}."
            )
        return range(first, end)

    def check_folders(self, run_dir: str | None) -> None:
        """Raises `ArgumentError` where files would have no folder."""
        if run_dir is not None:
            return
        if "tensorboard" in self.track and self.track_dir is None:
            raise ArgumentError(
                "`track` tensorboard needs a folder for its files. Got none: add `run_dir` DIR, or `track_dir` DIR."
            )
        if self.profile_steps is not None and self.profile_dir is None:
            raise ArgumentError(
                "`profile_steps` needs a folder for the profile. Got none: add `run_dir` DIR, or `profile_dir` DIR."
            )
