"""The training loop of a recipe: steps, evaluation, checkpoints, metrics and signals."""

import itertools
import sys
import time
import traceback
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
from rich.console import Console

from meshpipe.checkpoint import Checkpointer
from meshpipe.checkpoint.base import BASE, Base
from meshpipe.checkpoint.index import tree_bytes
from meshpipe.config import Config
from meshpipe.data import Batch, BatchIterator, Source, batches
from meshpipe.environment import versions
from meshpipe.errors import advice_on
from meshpipe.observe.watchdog import Watchdog
from meshpipe.phases import phase
from meshpipe.processes.coordination import process_count
from meshpipe.processes.exit_codes import COMPLETED, FAILED
from meshpipe.processes.guard import is_lost_connection
from meshpipe.processes.progress import Progress
from meshpipe.processes.stop import StopRequest
from meshpipe.processes.stop_together import StopTogether
from meshpipe.report.tables import count_of, format_bytes
from meshpipe.runs.journal import Journal
from meshpipe.runs.profile_window import ProfileWindow
from meshpipe.runs.progress_line import ProgressLine
from meshpipe.runs.record import (
    checkpoint_metadata,
    config_values,
    device_names,
    run_layout,
)
from meshpipe.runs.run_folder import write_settings
from meshpipe.runs.start import Start
from meshpipe.runs.step_metrics import StepMetrics
from meshpipe.runs.trace_file import TraceFile
from meshpipe.runs.warning import Warnings
from meshpipe.sharding import local_value
from meshpipe.trainer import Trainer
from meshpipe.training.result import NonFiniteError, StepResult
from meshpipe.training.state import StateTree

STEPS_BEFORE_TRACE = 2
"""The first steps of a run are slower than the rest and are not traced."""
EVALUATION_SECONDS = 600.0
"""How long a stop waits for the next batch of an evaluation; the first batch compiles."""


@dataclass(frozen=True)
class Outputs:
    """The outputs of a run, and the name of its recipe."""

    recipe: str
    metrics: Journal
    checkpointer: Checkpointer | None
    console: Console
    raises: bool = False
    """Whether the caller raises the error of a run that fails; otherwise it is printed."""
    folder: Path | None = None
    """The folder of the run, if it has one and this process writes to it."""
    left_out_base: Base | None = None
    """The parameters that checkpoints leave out because they are not trained."""


class _InFlight(NamedTuple):
    """A step that was dispatched and whose result was not read yet."""

    result: StepResult
    tokens: int | None
    completion: Future[float]
    """Time at which the devices completed it."""
    waited: float
    """Seconds that the loop waited for its batch."""


class Loop:
    """The training loop, which keeps one step in flight while it dispatches the next.

    Reading a loss waits for the devices. So each step is read, checked and reported only after the next one was
    dispatched, and the devices never wait for the host.
    """

    def __init__(
        self,
        config: Config,
        trainer: Trainer,
        train_batches: BatchIterator,
        held_out: Source | None,
        outputs: Outputs,
        stop: StopRequest,
        watchdog: Watchdog | None = None,
        start: Start | None = None,
    ) -> None:
        self._watchdog = watchdog
        self._config = config
        self._trainer = trainer
        self._batches = train_batches
        self._held_out = held_out
        self._out = outputs
        self._stop = stop
        self._start = start
        self._in_flight: _InFlight | None = None
        self._watch = ThreadPoolExecutor(1, "watch")
        self._good_step = trainer.step_number
        """The last update known to be finite."""
        self._skipped = 0
        """Updates of this run left out because they were not finite."""
        self._warnings = Warnings()
        left_out, tokens_seen = (0, 0) if start is None else (start.left_out, start.tokens_seen)
        self._metrics = StepMetrics(config, trainer, left_out, tokens_seen, self._warnings)
        self._first_step = trainer.step_number + 1
        self._first = phase("Running the first step")
        self._trace = None if config.trace is None else TraceFile(config.trace, self._warnings)
        self._profile = ProfileWindow(config, self._first_step, self._warnings)
        self._clock = time.perf_counter()
        self._saved_step = start.step if start is not None and start.is_own else None
        self._evaluated_step: int | None = None
        self.error: BaseException | None = None
        """The error that ended the run."""
        self.saved_step: int | None = None
        """The newest step that its folder holds at the end."""
        self.progress = Progress(trainer.step_number)
        """Read by other threads and processes."""
        self._line = ProgressLine(outputs.console, config.steps, trainer.step_number)

    def run(self) -> int:
        started = time.perf_counter()
        error: BaseException | None = None
        try:
            self._begin()
            status = self._train()
        except (Exception, SystemExit) as exception:  # sys.exit in the user's code does not complete a run
            status, error = "failed", exception
        except KeyboardInterrupt as exception:  # of a caller who handles signals
            status, error = "stopped", exception
        finally:
            self._first.end()
            self._close_profile()
            self._line.close()
            self._watch.shutdown()
        saved = self.saved_step = self._newest_checkpoint()
        end = {"status": status, "step": self._good_step, "saved_step": saved, "seconds": time.perf_counter() - started}
        self._out.metrics.write("end", end if error is None else end | {"error": f"{type(error).__name__}: {error}"})
        self._out.metrics.end_trackers(status)
        if error is not None:
            self.error = error
            if not self._out.raises:
                self._explain(error, saved)
            return FAILED
        self._say(self._last_line(status, saved))
        return COMPLETED if status == "completed" else self._stop.exit_status

    @property
    def good_step(self) -> int:
        """The last update known to be finite."""
        return self._good_step

    @property
    def values(self) -> dict[str, Any]:
        """The metrics of the last step that was read; empty before the first."""
        return self._metrics.newest

    def _begin(self) -> None:
        """Reads the first batch; until then, nothing is lost by a stop at once."""
        try:
            if self._trainer.step_number < self._config.steps:
                with phase("Reading the first batch"):
                    self._batches.put_back(next(self._batches))
                self._first.__enter__()
        finally:
            self._stop.begin_steps()
            values = self._start_values()
            self._out.metrics.write("start", values)
            if self._out.folder is not None:
                write_settings(self._out.folder, values, self._warnings)

    def _train(self) -> str:
        config, trainer = self._config, self._trainer
        stopped = False
        together = StopTogether(self._stop)
        while trainer.step_number < config.steps and not (stopped := together.after(trainer.step_number)):
            began = time.perf_counter()
            batch = next(self._batches)
            self._step(batch, time.perf_counter() - began)
        self._finish_step()
        self._save()
        if self._out.checkpointer is not None:
            size = format_bytes(tree_bytes(self._saved_shapes))
            with self.progress.during("save"), phase(f"Writing the last checkpoint ({size})"):
                self._out.checkpointer.wait()
        if stopped:
            return "stopped"
        self._evaluate()
        return "completed"

    def _step(self, batch: Batch, waited: float) -> None:
        """Dispatches one step, finishes the previous one, and saves or evaluates if due."""
        config, trainer = self._config, self._trainer
        number = trainer.step_number + 1
        measure, profile = self._is_timed(number), self._profile.begins_with(number)
        if measure or profile:
            self._finish_step()
        if profile:
            self._profile.open()
            self._clock = time.perf_counter()
        if self._watchdog is not None:
            self._watchdog.begin_step()
        observe = None if self._watchdog is None else self._watchdog.observe
        with self._profile.annotate(number):
            result = trainer.step(batch, measure=measure, observe=observe)
        self.progress.dispatched(result.step)
        # A separate thread records when it completes; this one looks only after dispatching the next step.
        completion = self._watch.submit(_completion_time, result)
        if not self._finish_step():  # then this update was left out as well
            self._batches.put_back(batch)
            return
        self._in_flight = _InFlight(result, config.model.tokens(batch), completion, waited)
        if measure:  # the time to write its trace belongs to no step
            self._finish_step()
        if self._profile.ends_with(result.step):
            self._finish_step()
            self._close_profile()
        if _is_due(result.step, config.checkpoint.checkpoint_every):
            self._finish_step()
            self._save()
        if _is_due(result.step, config.eval_every):
            self._finish_step()
            self._evaluate()

    def _finish_step(self) -> bool:
        """Waits for the step in flight, checks that it is finite, and reports it.

        Returns False when its batch is skipped; then this update and any dispatched after it were left out.
        """
        if self._in_flight is None:
            return True
        (result, tokens, completion, waited), self._in_flight = self._in_flight, None
        try:
            self._trainer.check(result)
        except NonFiniteError as error:
            self._skip(error)
        self._first.end()
        seconds, self._clock = completion.result() - self._clock, completion.result()
        self._good_step = result.step
        self.progress.completed(result.step, seconds)
        if self._watchdog is not None:
            self._watchdog.end_step()
        values = self._metrics.of(result, tokens, seconds, waited)
        if result.measured is not None and self._trace is not None:
            self._trace.add(result.step, result.measured)
            self._clock = time.perf_counter()
        self._out.metrics.write("step", values)
        self._line.step(values, terms=tuple(result.terms))
        return bool(local_value(result.good))

    def _close_profile(self) -> None:
        """Writes the profile, if the window is open; its time belongs to no step."""
        sentence = self._profile.close()
        if sentence is not None:
            self._say(sentence)
            self._clock = time.perf_counter()

    def _skip(self, error: NonFiniteError) -> None:
        """Skips a step that is not finite and was left out; raises the error when no more skips are allowed."""
        allowed = self._config.skip_nonfinite
        if not error.left_out or self._skipped == allowed:
            raise error
        self._skipped += 1
        # It counts as a step, so step numbers stay aligned with batches.
        self._trainer.step_number = error.step
        self._say(f"{error} Its update was left out ({self._skipped} of {allowed} by --skip-nonfinite).")

    def _is_timed(self, step: int) -> bool:
        config = self._config
        if config.measure_every or config.trace is None:
            return _is_due(step, config.measure_every)
        return step == min(self._first_step + STEPS_BEFORE_TRACE, config.steps)

    def _evaluate(self) -> None:
        if self._held_out is None or self._evaluated_step == self._good_step:
            return
        started = time.perf_counter()
        config = self._config
        in_order = batches(self._held_out, config.batch_size, shuffle=False, epochs=1, drop_remainder=False)
        with self.progress.during("evaluation", EVALUATION_SECONDS), phase("Evaluating"), closing(in_order):
            if process_count() > 1:
                in_order.read_only(self._trainer.model.rows_read(evaluation=True))
            values = self._trainer.evaluate(self._counted(itertools.islice(in_order, config.eval_batches)))
        self._evaluated_step = self._good_step
        self._clock = time.perf_counter()
        seconds = self._clock - started
        self._out.metrics.write("eval", {"step": self._good_step, **values, "eval_time_s": seconds})
        numbers = "  ".join(f"{name} {value:.4f}" for name, value in values.items())
        self._line.say(f"step {self._good_step}  held out: {numbers}")

    def _counted(self, held_out: Iterable[Batch]) -> Iterator[Batch]:
        """The batches; each one requested counts as progress."""
        for batch in held_out:
            self.progress.made_progress()
            yield batch

    def _save(self) -> None:
        """Starts saving the current step; the checkpointer writes it while training continues."""
        checkpointer, step = self._out.checkpointer, self._good_step
        if checkpointer is None or step == self._saved_step:
            return
        position, counted = self._batches.get_state(), (self._metrics.left_out, self._metrics.tokens_seen or None)
        metadata = checkpoint_metadata(self._config, self._out.recipe, self._layout, step, position, *counted)
        if self._out.left_out_base is not None:
            metadata[BASE] = self._out.left_out_base.values()
        with self.progress.during("save"), phase("Saving a checkpoint"):
            if self._saved_step is None and self._start is not None:
                self._start.keep_companions(checkpointer.directory)
            trees = self._trainer.state_tree(frozen=self._out.left_out_base is None)
            checkpointer.save(step, trees, metadata, self._saved_shapes)
        self._saved_step = step
        self._clock = time.perf_counter()

    @property
    def _saved_shapes(self) -> list[StateTree]:
        return self._trainer.abstract_state_tree(frozen=self._out.left_out_base is None)

    @property
    def _layout(self) -> dict[str, Any]:
        return run_layout(self._config, self._trainer.model)

    def _start_values(self) -> dict[str, Any]:
        return {
            "config": config_values(self._config),
            "layout": self._layout,
            "devices": device_names(self._trainer.mesh.devices.flat),
            "versions": versions(),
            "model_flops_per_step": self._metrics.utilisation.flops,
            "step": self._good_step,
            "recipe": self._out.recipe,
            **self._origin,
        }

    @property
    def _origin(self) -> dict[str, Any]:
        """The checkpoint of another run that this run began from, if any."""
        return {} if self._start is None or self._start.is_own else {"init_from": self._start.origin}

    def _newest_checkpoint(self) -> int | None:
        if self._out.checkpointer is None:
            return None
        try:
            self._out.checkpointer.wait()
        except Exception as error:
            self._say(f"A checkpoint could not be written: {error}")
        return self._out.checkpointer.latest()

    def _last_line(self, status: str, saved: int | None) -> str:
        parts = [f"{status.capitalize()} after step {self._good_step} of {self._config.steps}"]
        if self._metrics.newest:
            parts.append(f"loss {self._metrics.newest['loss']:.4f}, {self._metrics.mean_speed()}")
        if self._metrics.left_out:
            parts.append(f"{count_of(self._metrics.left_out, 'update was', 'updates were')} left out")
        return "; ".join(parts) + f". {self._saved_sentence(saved)}"

    def _saved_sentence(self, saved: int | None) -> str:
        if saved is None:
            return "Nothing was saved."
        rest = "" if saved >= self._config.steps else "; resume from it with --resume"
        return f"Step {saved} is saved in {self._config.checkpoint.checkpoint_dir}{rest}."

    def _explain(self, error: BaseException, saved: int | None) -> None:
        """Prints a failure to standard error; the last lines say what happened, where, and what was saved."""
        if not self._trainer.group.is_alone and is_lost_connection(error):
            return  # `Guard` finds and prints which process is gone
        advice = advice_on(error)
        if not advice and not isinstance(error, NonFiniteError):
            traceback.print_exception(error)
        where = "" if isinstance(error, NonFiniteError) else f" after step {self._good_step}"
        text = "\n".join((str(error), *advice))
        print(f"meshpipe: the run failed{where}: {text}\n{self._saved_sentence(saved)}", file=sys.stderr)

    def _say(self, text: str) -> None:
        self._line.say(text)


def _completion_time(result: StepResult) -> float:
    jax.block_until_ready(result.good)
    return time.perf_counter()


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
