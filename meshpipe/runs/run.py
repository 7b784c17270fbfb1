"""A run of a recipe, from its first check to its exit status."""

from collections.abc import Mapping
from contextlib import ExitStack, closing
from types import MappingProxyType
from typing import Any, NamedTuple

from rich.console import Console

from meshpipe.checkpoint import Checkpointer
from meshpipe.checkpoint.base import Base
from meshpipe.config import Config
from meshpipe.data import BatchIterator, Source, batches, check_limits, check_source
from meshpipe.host import no_garbage_collection
from meshpipe.layers.staged_model import StagedModel
from meshpipe.observe.trace import check_trace
from meshpipe.observe.watchdog import Watchdog
from meshpipe.phases import phase
from meshpipe.processes.agreement import agree
from meshpipe.processes.coordination import barrier, process_count, process_index
from meshpipe.processes.exit_codes import COMPLETED
from meshpipe.processes.group import Group
from meshpipe.processes.guard import Guard
from meshpipe.processes.progress import StopLimit
from meshpipe.processes.stop import StopRequest
from meshpipe.report.plan import layout_lines
from meshpipe.runs.base_record import base_record, saves_base
from meshpipe.runs.build import make_trainer, saved_shapes
from meshpipe.runs.find_start import find_start
from meshpipe.runs.history import History
from meshpipe.runs.journal import Journal
from meshpipe.runs.log_file import LogFile
from meshpipe.runs.loop import Loop, Outputs
from meshpipe.runs.metrics import MetricsFile
from meshpipe.runs.profile_window import check_profile
from meshpipe.runs.record import check_can_be_saved, checkpoint_metadata, run_layout
from meshpipe.runs.run_folder import LOG, draw_run, in_run_dir, run_folder
from meshpipe.runs.settings import describe_config, describe_source
from meshpipe.runs.start import Start
from meshpipe.runs.trackers import check_trackers, started_trackers
from meshpipe.trainer import Trainer
from meshpipe.training.state import StartingState

END_SECONDS = 600.0
"""How long processes wait for each other at the end of a run."""


class Ended(NamedTuple):
    """How a run ended."""

    status: int
    """The exit status of a command."""
    step: int
    """The last update known to be finite."""
    error: BaseException | None = None
    """The error that ended it."""
    values: Mapping[str, Any] = MappingProxyType({})
    """The metrics of the last step."""
    saved_step: int | None = None
    """The newest step in the folder of checkpoints."""
    trainer: Trainer | None = None
    """The trained model; None where there was nothing left to do."""


def run(
    config: Config, recipe: str, console: Console, guard: Guard, stop: StopRequest, step_timeout: float = 0.0
) -> int:
    """Trains as `config` says, for a command; returns the exit status 0, 1, 129, 130 or 143.

    Raises `ValueError` for an invalid config, before anything is compiled or written.
    """
    return conduct(config, recipe, console, guard, stop, step_timeout).status


def conduct(
    config: Config,
    recipe: str,
    console: Console,
    guard: Guard,
    stop: StopRequest,
    step_timeout: float = 0.0,
    history: History | None = None,
) -> Ended:
    """Trains as `config` says.

    When `stop` has received a signal, the run ends after the step in progress. When no step completes for
    `step_timeout` seconds, `guard` ends the process with status 1; 0 waits for ever. With a `history`, which is told
    every event, an error that ends the run is left to the caller; otherwise it is printed.

    Raises `ValueError` for an invalid config, before anything is compiled or written.
    """
    config = in_run_dir(config)
    group = Group(range(process_count()))
    if not group.is_alone:
        agree(group, "settings", describe_config(config))
    with ExitStack() as files:
        folder = files.enter_context(run_folder(config, guard.undo))
        own = folder if process_index() == 0 else None
        log = None if own is None else files.enter_context(LogFile(console))
        _check_outputs(config)
        start = find_start(config)
        if start is not None and start.is_own and start.step >= config.steps:
            start.verify()
            console.print(f"Nothing left to do: {start.folder} holds step {start.step}, and --steps is {config.steps}.")
            return Ended(COMPLETED, start.step, saved_step=start.step)
        with phase("Opening the data"):
            train_batches, held_out = _open_data(config, start, group)
        files.enter_context(closing(train_batches))
        trackers = files.enter_context(started_trackers(config, recipe, start))
        checkpointer = _checkpointer(config, files, guard)
        trainer = _make_trainer(config, recipe, start, checkpointer, train_batches, console)
        if start is not None:
            _tell_start(start, config, checkpointer, console)
        if own is not None and log is not None:
            log.open(own / LOG)
        file = files.enter_context(MetricsFile(_metrics_file(config), append=config.checkpoint.may_continue))
        journal = Journal(file, trackers, also=None if history is None else history.write)
        outputs = Outputs(
            recipe, journal, checkpointer, console, history is not None, own, _left_out_base(config, trainer, start)
        )
        watchdog = files.enter_context(Watchdog(trainer.plan, step_timeout, guard.fail))
        observed = watchdog if step_timeout else None
        loop = Loop(config, trainer, train_batches, held_out, outputs, stop, observed, start)
        guard.progress = loop.progress
        with StopLimit(loop.progress, stop, guard.give_up, dict if group.is_alone else guard.steps_of_all):
            status = loop.run()
        if own is not None:
            draw_run(own, config, console)
        if not group.is_alone:
            if loop.error is not None:
                guard.fail(loop.error)
            barrier("meshpipe/end", END_SECONDS)  # process 0 serves the key-value store until all are here
        return Ended(status, loop.good_step, loop.error, loop.values, loop.saved_step, trainer)


def _checkpointer(config: Config, files: ExitStack, guard: Guard) -> Checkpointer | None:
    """What saves the run, where it is to be saved; closed with `files`."""
    directory, keep = config.checkpoint.checkpoint_dir, config.checkpoint.checkpoint_keep
    if directory is None:
        return None
    checkpointer = files.enter_context(Checkpointer(directory, keep=keep))
    guard.undo.append(checkpointer.abandon)
    return checkpointer


def _left_out_base(config: Config, trainer: Trainer, start: Start | None) -> Base | None:
    """The base that the checkpoints of a run leave out."""
    if config.checkpoint.checkpoint_dir is None or saves_base(config, trainer.model, start):
        return None
    with phase("Digesting the parameters that are not trained"):
        return base_record(trainer, start)


def _metrics_file(config: Config) -> str | None:
    return config.metrics if process_index() == 0 else None


def _check_outputs(config: Config) -> None:
    """Raises `ValueError` when an output cannot be written, or holds another run."""
    MetricsFile.check(_metrics_file(config), append=config.checkpoint.may_continue)
    check_trace(config.trace)
    check_profile(config)
    if process_index() == 0:
        check_trackers(config)


def _open_data(config: Config, start: Start | None, group: Group) -> tuple[BatchIterator, Source | None]:
    """The training batches, at their position in a continued run, and the held-out source if the run evaluates."""
    source = check_source(config.data.train_source())
    check_limits(source, config.model.limits())
    train_batches = batches(source, config.batch_size, config.seed)
    if config.checkpoint.checkpoint_dir is not None:
        check_can_be_saved(config)
        train_batches.get_state()  # raises if the position cannot be saved
    if start is not None and not start.weights_only:
        train_batches.set_state(start.metadata["data"])
    held_out = check_source(config.data.eval_source()) if config.eval_batches else None
    if held_out is not None:
        batches(held_out, config.batch_size, drop_remainder=False).close()  # raises if there is no example
    if not group.is_alone:
        agree(group, "data", describe_source("training", source) | describe_source("held-out", held_out))
    return train_batches, held_out


def _make_trainer(
    config: Config,
    recipe: str,
    start: Start | None,
    checkpointer: Checkpointer | None,
    train_batches: BatchIterator,
    console: Console,
) -> Trainer:
    """The compiled trainer, which starts where it is to, after a check that it can be saved; prints its layout."""

    def check(model: StagedModel) -> StartingState | None:
        if start is not None:
            start.check(model)
        if checkpointer is not None:
            position, layout = train_batches.get_state(), run_layout(config, model)
            saved = saved_shapes(config, model, frozen=saves_base(config, model, start))
            checkpointer.prepare(saved, checkpoint_metadata(config, recipe, layout, 0, position))
        return None if start is None else start.read(saved_shapes(config, model))

    with no_garbage_collection():
        trainer = make_trainer(config, check)
    if start is not None:
        start.check_first_values(trainer)
    if process_count() > 1:
        train_batches.read_only(trainer.model.rows_read())
    for line in layout_lines(recipe, trainer.model, trainer.notes):
        console.print(line)
    console.print(f"Compiled and initialised in {trainer.compile_seconds:.1f} s.")
    return trainer


def _tell_start(start: Start, config: Config, checkpointer: Checkpointer | None, console: Console) -> None:
    """Says where the trainer starts, and renames the steps that its updates will replace."""
    console.print(str(start))
    if checkpointer is not None and config.checkpoint.resume_from is not None and process_index() == 0:
        for later in checkpointer.supersede(start.step):
            console.print(f"Step {later} is now {later}.superseded.")
