"""The steps of a run that JAX's profiler records."""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import jax

from meshpipe.config import Config
from meshpipe.environment import unfit_libtpu
from meshpipe.errors import ArgumentError
from meshpipe.files import check_folder
from meshpipe.processes.coordination import process_index
from meshpipe.runs.warning import Warnings


def check_profile(config: Config) -> None:
    """Raises `ArgumentError` when the run ends before the window does, the folder cannot be written, or the installed
    libtpu is another than that of `jax`.
    """
    window, folder = config.observe.profile_window, config.observe.profile_dir
    if window is None or folder is None:
        return
    if window.stop - 1 > config.steps:
        raise ArgumentError(
            f"`profile_steps` must lie within the run. Got {config.observe.profile_steps}, which ends with step "
            f"{window.stop - 1}, and a run of {config.steps} steps."
        )
    check_folder("profile_dir", folder)
    unfit = unfit_libtpu()
    if unfit is not None:  # JAX's profiler starts that of libtpu too, and ends the process by a signal
        raise ArgumentError(f"`profile_steps` cannot be recorded: {unfit}")


class ProfileWindow:
    """Starts the profiler before the first step of the window, and stops it after the last.

    Each process writes its own profile. A profile that cannot be written gives one warning, and the run continues.
    """

    def __init__(self, config: Config, first_step: int, warnings: Warnings) -> None:
        self._steps = config.observe.profile_window
        self._folder = Path(config.observe.profile_dir or "")
        if process_index():  # processes of one machine would write the same file
            self._folder /= f"process{process_index()}"
        self._warnings = warnings
        self.is_open = False
        if self._steps is not None and first_step > self._steps.start:
            warnings.say_once(
                "profile",
                f"nothing is profiled: --profile-steps {config.observe.profile_steps} begins before step {first_step}, "
                "with which this run continues.",
            )

    def begins_with(self, step: int) -> bool:
        return self._steps is not None and step == self._steps.start

    def ends_with(self, step: int) -> bool:
        return self.is_open and self._steps is not None and step >= self._steps.stop - 1

    def open(self) -> None:
        try:
            jax.profiler.start_trace(self._folder)
            self.is_open = True
        except Exception as error:
            self._fail(error)

    def close(self) -> str | None:
        """Writes what was recorded, if the window is open; returns a sentence about it."""
        if not self.is_open:
            return None
        self.is_open = False
        try:
            jax.profiler.stop_trace()
        except Exception as error:
            self._fail(error)
            return None
        return f"The profile is in {self._folder}."

    def annotate(self, step: int) -> AbstractContextManager[object]:
        """Marks a step in the profile."""
        return jax.profiler.StepTraceAnnotation("train", step_num=step) if self.is_open else nullcontext()

    def _fail(self, error: Exception) -> None:
        self._warnings.say_once("profile", f"the profile could not be written: {error}. The run continues without it.")
