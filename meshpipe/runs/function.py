"""A run of a recipe's config as a Python function, for notebooks and sweeps."""

import threading
from contextlib import ExitStack

from meshpipe.config import Config
from meshpipe.errors import ArgumentError
from meshpipe.processes.coordination import process_count
from meshpipe.processes.exit_codes import COMPLETED
from meshpipe.processes.guard import Guard
from meshpipe.processes.stop import StopRequest
from meshpipe.report.live_line import LiveLine
from meshpipe.report.phases import showing_phases
from meshpipe.report.tables import make_console
from meshpipe.runs.history import History, RunResult
from meshpipe.runs.run import conduct
from meshpipe.runs.run_folder import in_run_dir


def run(config: Config, *, name: str = "run", show: bool = True, handle_signals: bool = False) -> RunResult:
    """Trains as `config` says, like `meshpipe train`, and returns its result; raises where the command would exit.

    A process can call it any number of times. It changes no setting of the process, except that Python's garbage
    collection pauses while the trainer is made. Signals are left to the caller: a `KeyboardInterrupt` ends the run at
    once, saves nothing more and is raised. For several processes, use `meshpipe launch`.

    Arguments:
        config: The run, as a recipe returns it. On virtual CPU devices, call `meshpipe.use_cpu_devices` first.
        name: What checkpoints and metrics call the run. With the name of a recipe, such as `recipes/mine.py:small`,
            `meshpipe.load` can find its layers.
        show: Whether to print the layout, what takes long, the progress and the evaluations. A notebook shows a live
            line of the progress if ipywidgets is installed.
        handle_signals: Whether to stop on SIGINT, SIGTERM and SIGHUP as the command does: the run finishes the step in
            progress, saves it, and returns with the status `stopped`. A second SIGINT ends the process. Only in the
            main thread.

    Raises `ValueError` for an invalid config, before anything is compiled or written; `NonFiniteError` when numbers
    are no longer finite and no more batches may be skipped; and whatever layers, data and file system raise, with a
    note that says what was saved.
    """
    if not isinstance(config, Config):
        raise ArgumentError(f"`config` must be a meshpipe.Config, as recipes return. Got {config!r:.80}.")
    if process_count() > 1:
        raise ArgumentError(
            "meshpipe.run is for one process. Got several, joined by jax.distributed. Use `meshpipe launch`, or a "
            "meshpipe.Trainer in each."
        )
    if handle_signals and threading.current_thread() is not threading.main_thread():
        raise ArgumentError("Python handles signals in the main thread alone. Leave `handle_signals` out elsewhere.")
    config, history, stop = in_run_dir(config), History(), StopRequest()
    with ExitStack() as entered:
        guard = entered.enter_context(Guard(config.checkpoint.checkpoint_dir))
        if handle_signals:
            entered.enter_context(stop)
        if show:
            entered.enter_context(showing_phases(LiveLine(None), on_stderr=False))
        console = make_console(quiet=not show)
        ended = conduct(config, name, console, guard, stop, history=history)
    if ended.error is not None:
        if isinstance(ended.error, Exception):
            folder = config.checkpoint.checkpoint_dir
            saved = "Nothing was saved" if ended.saved_step is None else f"Step {ended.saved_step} is saved in {folder}"
            ended.error.add_note(f"The run failed after step {ended.step}. {saved}.")
        raise ended.error
    return RunResult(
        status="completed" if ended.status == COMPLETED else "stopped",
        step=ended.step,
        values=ended.values,
        losses=history.losses,
        evaluations=history.evaluations,
        checkpoint=config.checkpoint.checkpoint_dir,
        trainer=ended.trainer,
    )
