"""The training loop of a recipe: steps, evaluation, checkpoints, metrics and signals."""

import itertools
import sys
import time
import traceback
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from meshpipe.checkpoint import Checkpointer
from meshpipe.config import Config
from meshpipe.data import BatchIterator, Source, batches
from meshpipe.observe.clock import MeasuredStep
from meshpipe.observe.trace import write_trace
from meshpipe.observe.watchdog import Watchdog
from meshpipe.processes.coordination import process_count, process_index
from meshpipe.processes.exit_codes import COMPLETED, FAILED
from meshpipe.processes.group import Group
from meshpipe.processes.stop import StopRequest, StopTogether
from meshpipe.report.picture import Panel, draw_timelines, has_matplotlib
from meshpipe.run.metrics import MetricsFile, ProgressLine, speed
from meshpipe.run.record import (
    checkpoint_metadata,
    config_values,
    device_names,
    layout_values,
    versions,
)
from meshpipe.sharding import local_value
from meshpipe.trainer import NonFiniteError, StepResult, Trainer

STEPS_BEFORE_TRACE = 2
"""The first steps of a run are not like the others."""
TELL_SECONDS = 60.0
"""How long processes wait for each other's times of a step."""
RATES_AT_ONCE = 1024
"""Learning rates that are computed together."""
LONGEST_TRACE = 10
"""Timed steps that a trace holds, the last ones."""


@dataclass(frozen=True)
class Outputs:
    """Where a run writes, and under which name."""

    recipe: str
    metrics: MetricsFile
    checkpointer: Checkpointer | None
    console: Console


class Loop:
    """The state of a run between two steps, of which one may be on its way while the next is handed over.

    Reading a loss waits for the devices, so a step is read, checked and reported only after the next one was
    dispatched; the devices never wait for the host.
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
    ) -> None:
        self._watchdog = watchdog
        self._config = config
        self._trainer = trainer
        self._batches = train_batches
        self._held_out = held_out
        self._out = outputs
        self._stop = stop
        self._rates: tuple[int, np.ndarray] = (0, np.zeros(0))
        self._learning_rate(trainer.step_number)
        self._on_its_way: tuple[StepResult, int | None, Future[float]] | None = None
        self._watch = ThreadPoolExecutor(1, "watch")
        self._good_step = trainer.step_number
        """The last update that is known to be finite."""
        self._values: dict[str, Any] = {}
        """What was reported of it."""
        self._work = {"step_time_s": 0.0, "examples": 0, "tokens": 0}
        """Sums over the steps of this run."""
        self._first_step = trainer.step_number + 1
        self._timed: dict[int, MeasuredStep] = {}
        """The last timed steps by number, for the trace."""
        self._clock = time.perf_counter()
        self._saved_step = trainer.step_number if trainer.step_number else None
        self._evaluated_step: int | None = None
        self.error: Exception | None = None
        """What made it fail."""
        self._progress = ProgressLine(outputs.console, config.steps, trainer.step_number)

    def run(self) -> int:
        started = time.perf_counter()
        error: Exception | None = None
        try:
            self._out.metrics.write("start", self._start_values())
            status = self._train()
        except Exception as exception:
            status, error = "failed", exception
        finally:
            self._progress.close()
            self._watch.shutdown()
        saved = self._newest_checkpoint()
        end = {"status": status, "step": self._good_step, "saved_step": saved, "seconds": time.perf_counter() - started}
        try:
            self._out.metrics.write(
                "end", end if error is None else end | {"error": f"{type(error).__name__}: {error}"}
            )
        except OSError as exception:
            status, error = "failed", error or exception
        if error is not None:
            self.error = error
            self._explain(error, saved)
            return FAILED
        self._say(self._last_line(status, saved))
        return COMPLETED if status == "completed" else self._stop.exit_status

    def _train(self) -> str:
        config, trainer = self._config, self._trainer
        stopped = False
        together = StopTogether(self._stop)
        while trainer.step_number < config.steps and not (stopped := together.after(trainer.step_number)):
            batch = next(self._batches)
            measure = self._is_timed(trainer.step_number + 1)
            if measure:
                self._finish_step()
            if self._watchdog is not None:
                self._watchdog.begin_step()
            observe = None if self._watchdog is None else self._watchdog.observe
            result = trainer.step(batch, measure=measure, observe=observe)
            # A thread notes when it is complete, since this one will look only after handing over the next step.
            completion = self._watch.submit(_completion_time, result)
            self._finish_step()
            self._on_its_way = result, config.model.tokens(batch), completion
            if measure:  # writing its trace takes time that is no step's
                self._finish_step()
            if _is_due(result.step, config.checkpoint.checkpoint_every):
                self._finish_step()
                self._save()
            if _is_due(result.step, config.eval_every):
                self._finish_step()
                self._evaluate()
        self._finish_step()
        self._save()
        if self._out.checkpointer is not None:
            self._out.checkpointer.wait()
        if stopped:
            return "stopped"
        self._evaluate()
        return "completed"

    def _finish_step(self) -> None:
        """Waits for the step on its way, checks that it is finite, and reports it."""
        if self._on_its_way is None:
            return
        (result, tokens, completion), self._on_its_way = self._on_its_way, None
        self._trainer.check(result)
        seconds, self._clock = completion.result() - self._clock, completion.result()
        self._good_step = result.step
        if self._watchdog is not None:
            self._watchdog.end_step()
        self._values = {
            "step": result.step,
            "loss": float(local_value(result.loss)),
            "grad_norm": float(local_value(result.grad_norm)),
            # The schedule counts the updates before this one.
            "learning_rate": self._learning_rate(result.step - 1),
            "step_time_s": seconds,
            "examples_per_s": self._config.batch_size / seconds,
        }
        if tokens is not None:
            self._values["tokens_per_s"] = tokens / seconds
        if result.measured is not None:
            self._values["bubble_fraction"] = _bubble_of_all(result, self._trainer.group)
            self._trace(result.step, result.measured)
        done = {"step_time_s": seconds, "examples": self._config.batch_size, "tokens": tokens or 0}
        self._work = {name: total + done[name] for name, total in self._work.items()}
        self._out.metrics.write("step", self._values)
        self._progress.step(self._values)

    def _learning_rate(self, updates: int) -> float:
        """What the schedule says after so many updates.

        It is asked for many at once: on an accelerator, each time waits for all that was handed over before.
        """
        first, rates = self._rates
        if not first <= updates < first + len(rates):
            first = updates - updates % RATES_AT_ONCE
            schedule = self._config.optimizer.schedule(self._config.steps)
            rates = np.asarray(jax.vmap(schedule)(np.arange(first, first + RATES_AT_ONCE)))
            self._rates = first, rates
        return float(rates[updates - first])

    def _is_timed(self, step: int) -> bool:
        config = self._config
        if config.measure_every or config.trace is None:
            return _is_due(step, config.measure_every)
        return step == min(self._first_step + STEPS_BEFORE_TRACE, config.steps)

    def _trace(self, step: int, measured: MeasuredStep) -> None:
        """Writes the trace anew with one more step, and a picture of the first."""
        if self._config.trace is None:
            return
        file = Path(self._config.trace)
        if process_index():  # a file for each process, of its own ranks
            file = file.with_suffix(f".process{process_index()}.json")
        if not self._timed and has_matplotlib():
            panel = Panel(measured.timeline, f"{measured.timeline.plan.schedule}, step {step}", in_seconds=True)
            draw_timelines([panel], file.with_suffix(".png"))
        self._timed[step] = measured
        if len(self._timed) > LONGEST_TRACE:
            del self._timed[min(self._timed)]
        write_trace(file, self._timed)
        self._clock = time.perf_counter()

    def _evaluate(self) -> None:
        if self._held_out is None or self._evaluated_step == self._good_step:
            return
        started = time.perf_counter()
        config = self._config
        in_order = batches(self._held_out, config.batch_size, shuffle=False, epochs=1)
        if process_count() > 1:
            _ = self._trainer.model.evaluation
            in_order.read_only(self._trainer.model.rows_read(evaluation=True))
        values = self._trainer.evaluate(itertools.islice(in_order, config.eval_batches))
        self._evaluated_step = self._good_step
        self._clock = time.perf_counter()
        seconds = self._clock - started
        self._out.metrics.write("eval", {"step": self._good_step, **values, "eval_time_s": seconds})
        numbers = "  ".join(f"{name} {value:.4f}" for name, value in values.items())
        self._progress.say(f"step {self._good_step}  held out: {numbers}")

    def _save(self) -> None:
        """Hands the current step to the checkpointer, which writes it while training goes on."""
        checkpointer, step = self._out.checkpointer, self._good_step
        if checkpointer is None or step == self._saved_step:
            return
        position = self._batches.get_state()
        metadata = checkpoint_metadata(self._config, self._out.recipe, self._layout, step, position)
        checkpointer.save(step, self._trainer.state_tree(), metadata, self._trainer.abstract_state_tree())
        self._saved_step = step
        self._clock = time.perf_counter()

    @property
    def _layout(self) -> dict[str, Any]:
        model = self._trainer.model
        return layout_values(self._config, model.cuts, model.plan.schedule, model.remat or ())

    def _start_values(self) -> dict[str, Any]:
        return {
            "config": config_values(self._config),
            "layout": self._layout,
            "devices": device_names(self._trainer.mesh.devices.flat),
            "versions": versions(),
            "step": self._good_step,
            "recipe": self._out.recipe,
        }

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
        if self._values:
            seconds = self._work["step_time_s"]
            mean = {f"{unit}_per_s": self._work[unit] / seconds for unit in ("examples", "tokens") if self._work[unit]}
            parts.append(f"loss {self._values['loss']:.4f}, {speed(mean)}")
        return "; ".join(parts) + f". {self._saved_sentence(saved)}"

    def _saved_sentence(self, saved: int | None) -> str:
        if saved is None:
            return "Nothing was saved."
        rest = "" if saved >= self._config.steps else "; --resume goes on from it"
        return f"Step {saved} is saved in {self._config.checkpoint.checkpoint_dir}{rest}."

    def _explain(self, error: Exception, saved: int | None) -> None:
        """Tells a failure on standard error, last what happened, where, and what was saved."""
        if not isinstance(error, NonFiniteError):
            traceback.print_exception(error)
        where = "" if isinstance(error, NonFiniteError) else f" after step {self._good_step}"
        print(f"meshpipe: the run failed{where}: {error}\n{self._saved_sentence(saved)}", file=sys.stderr)

    def _say(self, text: str) -> None:
        self._progress.say(text)


def _completion_time(result: StepResult) -> float:
    jax.block_until_ready(result.good)
    return time.perf_counter()


def _bubble_of_all(result: StepResult, group: Group) -> float:
    """The idle share of all ranks in a timed step, also of those that live in other processes."""
    assert result.measured is not None
    timeline = result.measured.timeline
    if group.is_alone:
        return timeline.bubble_fraction
    own = f"{timeline.makespan!r} {sum(timeline.busy)!r} {timeline.num_ranks}"
    told = group.gather("busy", own, TELL_SECONDS)
    makespans, busy, ranks = zip(*(map(float, text.split()) for text in told), strict=True)
    return max(0.0, 1 - sum(busy) / (max(makespans) * sum(ranks)))


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
