"""A run of a recipe, from its first check to its exit status."""

from contextlib import ExitStack, closing

from rich.console import Console

from meshpipe.checkpoint import Checkpointer
from meshpipe.config import Config
from meshpipe.data import batches, check_limits, check_source
from meshpipe.host import no_garbage_collection
from meshpipe.layers.staged_model import StagedModel
from meshpipe.observe.trace import check_trace
from meshpipe.observe.watchdog import Watchdog
from meshpipe.processes.agreement import agree
from meshpipe.processes.coordination import barrier, process_count, process_index
from meshpipe.processes.exit_codes import COMPLETED
from meshpipe.processes.group import Group
from meshpipe.processes.guard import Guard
from meshpipe.processes.progress import StopLimit
from meshpipe.processes.stop import StopRequest
from meshpipe.report.plan import layout_lines
from meshpipe.run.loop import Loop, Outputs
from meshpipe.run.metrics import MetricsFile
from meshpipe.run.record import check_can_be_saved, checkpoint_metadata, run_layout
from meshpipe.run.settings import describe_config, describe_source
from meshpipe.run.setup import make_trainer, saved_shapes
from meshpipe.run.start import find_start

END_SECONDS = 600.0
"""How long processes wait for each other at the end of a run."""


def run(
    config: Config, recipe: str, console: Console, guard: Guard, stop: StopRequest, step_timeout: float = 0.0
) -> int:
    """Trains as `config` says; returns the exit status 0, 1, 129, 130 or 143.

    When `stop` has received a signal, the run ends after the step in progress. When no step completes for
    `step_timeout` seconds, `guard` ends the process with status 1; 0 waits for ever.

    Raises `ValueError` for an invalid config, before anything is compiled or written.
    """
    options, several = config.checkpoint, process_count() > 1
    metrics_file = config.metrics if process_index() == 0 else None
    group = Group(range(process_count()))
    if several:
        agree(group, "settings", describe_config(config))
    MetricsFile.check(metrics_file, append=options.may_continue)
    check_trace(config.trace)
    start = find_start(config)
    if start is not None and start.is_own and start.step >= config.steps:
        console.print(f"Nothing left to do: {start.folder} holds step {start.step}, and --steps is {config.steps}.")
        return COMPLETED
    source = check_source(config.data.train_source())
    check_limits(source, config.model.limits())
    train_batches = batches(source, config.batch_size, config.seed)
    if options.checkpoint_dir is not None:
        check_can_be_saved(config)
        train_batches.get_state()
    if start is not None and not start.weights_only:
        train_batches.set_state(start.metadata["data"])
    held_out = check_source(config.data.eval_source()) if config.eval_batches else None
    if held_out is not None:
        batches(held_out, config.batch_size).close()  # raises if there are too few examples
    if several:
        agree(group, "data", describe_source("training", source) | describe_source("held-out", held_out))
    with ExitStack() as files:
        files.enter_context(closing(train_batches))
        checkpointer = None
        if options.checkpoint_dir is not None:
            checkpointer = files.enter_context(Checkpointer(options.checkpoint_dir, keep=options.checkpoint_keep))

        def check(model: StagedModel) -> None:
            if start is not None:
                start.check(model)
            if checkpointer is not None:
                shapes = saved_shapes(config, model)
                position, layout = train_batches.get_state(), run_layout(config, model)
                checkpointer.prepare(shapes, checkpoint_metadata(config, recipe, layout, 0, position))

        with no_garbage_collection():
            trainer = make_trainer(config, check)
        if several:
            train_batches.read_only(trainer.model.rows_read())
        for line in layout_lines(recipe, trainer.model):
            console.print(line)
        console.print(f"Compiled in {trainer.compile_seconds:.1f} s.")
        if start is not None:
            console.print(start.load(trainer))
            if checkpointer is not None and options.resume_from is not None and process_index() == 0:
                for later in checkpointer.supersede(start.step):
                    console.print(f"Step {later} is now {later}.superseded.")
        metrics = files.enter_context(MetricsFile(metrics_file, append=options.may_continue))
        outputs = Outputs(recipe, metrics, checkpointer, console)
        watchdog = files.enter_context(Watchdog(trainer.plan, step_timeout, guard.fail))
        loop = Loop(
            config,
            trainer,
            train_batches,
            held_out,
            outputs,
            stop,
            watchdog if step_timeout else None,
            start,
        )
        guard.progress = loop.progress
        with StopLimit(loop.progress, stop, guard.give_up, guard.steps_of_all if several else dict):
            status = loop.run()
        if several:
            if loop.error is not None:
                guard.fail(loop.error)
            barrier("meshpipe/end", END_SECONDS)  # process 0 serves the key-value store until all are here
        return status
