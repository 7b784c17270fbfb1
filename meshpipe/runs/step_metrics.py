"""What the metrics file says of a step."""

import math
from typing import Any

from meshpipe.config import Config
from meshpipe.observe.utilisation import PeakMemory, Utilisation, model_flops
from meshpipe.runs.learning_rates import LearningRates
from meshpipe.runs.progress_line import speed
from meshpipe.runs.warning import Warnings
from meshpipe.sharding import local_value
from meshpipe.trainer import Trainer
from meshpipe.training.result import StepResult

GATHER_SECONDS = 60.0
"""How long processes wait for each other's step times."""


class StepMetrics:
    """Turns the results of steps into metric values, and adds them up over the run."""

    def __init__(
        self, config: Config, trainer: Trainer, left_out: int, tokens_seen: int | None, warnings: Warnings
    ) -> None:
        self._config, self._trainer, self._warnings = config, trainer, warnings
        devices = list(trainer.mesh.devices.flat)
        self._num_devices = len(devices)
        self.utilisation = Utilisation(model_flops(trainer.model, trainer.group), devices)
        self._memory = PeakMemory(devices)
        self._steps_before = trainer.step_number
        self.tokens_seen = tokens_seen
        """Tokens of all steps so far, including earlier runs; None until a step of a continued run tells how many they
        were, where the checkpoint did not.
        """
        self._rates = LearningRates(config.optimizer.schedule(config.steps))
        self._rates.after(trainer.step_number - left_out)
        self._sums = {"step_time_s": 0.0, "examples": 0, "tokens": 0}
        """Sums over the steps of this run."""
        self.left_out = left_out
        """Updates left out so far, including earlier runs; the optimizer and its schedule do not count them."""
        self.newest: dict[str, Any] = {}
        """The values of the last step."""

    def of(self, result: StepResult, tokens: int | None, seconds: float, waited: float) -> dict[str, Any]:
        """The values of a step that took `seconds` and had so many tokens, or None where there are none. The loop
        `waited` seconds for its batch.
        """
        values: dict[str, Any] = {
            "step": result.step,
            "loss": float(local_value(result.loss)),
            **{name: float(local_value(value)) for name, value in (*result.terms.items(), *result.metrics.items())},
            "grad_norm": float(local_value(result.grad_norm)),
            # The schedule counts the updates before this one.
            "learning_rate": self._rates.after(result.step - 1 - self.left_out),
            "step_time_s": seconds,
            "examples_per_s": self._config.batch_size / seconds,
        }
        if tokens is not None:
            if self.tokens_seen is None:
                self.tokens_seen = self._steps_before * tokens
            self.tokens_seen += tokens
            values["tokens_per_s"] = tokens / seconds
            values["tokens_per_s_per_device"] = tokens / seconds / self._num_devices
            values["tokens_seen"] = self.tokens_seen
        values |= self.utilisation.of(seconds) | self._memory.values()
        values["data_wait_share"] = min(1.0, waited / seconds)
        if result.measured is not None:
            values["bubble_fraction"] = self._bubble_of_all(result)
        done = {"step_time_s": seconds, "examples": self._config.batch_size, "tokens": tokens or 0}
        self._sums = {name: total + done[name] for name, total in self._sums.items()}
        good = bool(local_value(result.good))
        if not local_value(result.applied):
            values["left_out"] = "weight 0" if good else "not finite"
            self.left_out += 1
            if good:
                self._warnings.say_once(
                    "weight 0",
                    f"step {result.step} was left out: the weight of its loss is 0 over the whole batch, so the mean "
                    "is undefined. The metrics file marks such steps by left_out.",
                )
        self.newest = values
        return values

    def mean_speed(self) -> str:
        """The throughput over all steps of this run."""
        seconds = self._sums["step_time_s"]
        return speed(
            {f"{unit}_per_s": self._sums[unit] / seconds for unit in ("examples", "tokens") if self._sums[unit]}
        )

    def _bubble_of_all(self, result: StepResult) -> float:
        """The idle share of all ranks in a timed step, across all processes; NaN if a process does not report its times
        within the limit.
        """
        assert result.measured is not None
        timeline = result.measured.timeline
        if self._trainer.group.is_alone:
            return timeline.bubble_fraction
        own = f"{timeline.makespan!r} {sum(timeline.busy)!r} {timeline.num_ranks}"
        try:
            texts = self._trainer.group.gather("busy", own, GATHER_SECONDS)
        except TimeoutError as error:
            self._warnings.say_once("bubble", f"the bubble of step {result.step} is unknown: {error}")
            return math.nan
        makespans, busy, ranks = zip(*(map(float, text.split()) for text in texts), strict=True)
        return max(0.0, 1 - sum(busy) / (max(makespans) * sum(ranks)))
