"""Kills processes of a run at random moments, again and again, and looks at what the others do and what is saved.

    python tests/multiprocess/fault_campaign.py --kills 44 --seed 0

Each round starts the run again from its newest checkpoint and kills one process by SIGKILL. A round fails when another
process does not end by itself in time, with a failure and a message, or when a checkpoint is lost or damaged. At the
end the run is completed, and every loss that was ever written is compared with those of a run that was never killed.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from processes import ROOT, TIMEOUT, environment

from meshpipe.checkpoint import Checkpointer, verify_checkpoint
from meshpipe.checkpoint.lock import LOCK
from meshpipe.processes.launch import free_port

PHASES = ("compile", "step", "save", "restore")
RECIPE = f"{ROOT / 'tests' / 'tiny_recipes.py'}:pipeline"
FLAGS = ["--model.width", "128", "--data.width", "128", "--eval-batches", "0"]
SAVED = ["--checkpoint-dir", "run", "--checkpoint-every", "20", "--auto-resume"]
MORE_STEPS = 100
"""Steps of the round that completes the run."""
SECONDS_TO_END = 30.0
POLL_SECONDS = 0.001


@dataclass(frozen=True)
class Kill:
    """One kill: which process, and in what."""

    phase: str
    victim: int


@dataclass(frozen=True)
class Outcome:
    kill: Kill
    """With the phase in which the kill actually happened."""
    seconds: dict[int, float]
    """Seconds until each of the other processes had ended."""
    problems: list[str]
    megabytes: int
    """The highest memory use of any process."""


@dataclass
class Run:
    """A run in its own folder that is started, killed and restarted."""

    folder: Path
    processes: int
    random: random.Random
    rounds: int = 0
    compile_seconds: float = 1.5
    """How long it lately took from joining to the first step."""
    logs: list[Path] = field(default_factory=list)
    began: float = 0.0
    """When the last round began, in seconds since 1970."""

    @property
    def metrics(self) -> Path:
        return self.folder / "metrics.jsonl"

    @property
    def steps(self) -> list[int]:
        return Checkpointer(self.folder / "run").steps()

    def start(self, *flags: str) -> list[subprocess.Popen[bytes]]:
        self.rounds += 1
        self.began = time.time()
        self.logs = [self.folder / f"round-{self.rounds}-process-{number}.log" for number in range(self.processes)]
        command = [sys.executable, "-m", "meshpipe", "train", RECIPE, *FLAGS, "--mesh.pipeline", str(self.processes)]
        place = ["--coordinator", f"127.0.0.1:{free_port()}", "--process-count", str(self.processes)]
        command += [*place, "--metrics", str(self.metrics), *SAVED, *flags, "--process-id"]
        started = []
        for number, log in enumerate(self.logs):
            with open(log, "wb") as output:
                started.append(
                    subprocess.Popen(
                        [*command, str(number)], cwd=self.folder, env=environment(), stdout=output, stderr=output
                    )
                )
        return started

    def log(self, number: int = 0) -> str:
        return self.logs[number].read_text(errors="replace")

    def round(self, kill: Kill) -> Outcome:
        """Starts the run, kills a process, and waits for the others."""
        found = sorted(self.steps)
        started = self.start("--steps", "1000000")
        try:
            self._reach(kill.phase, started)
            before, moment = self.steps, self._phase(kill.phase)
            memory = max(map(_megabytes, started))
            started[kill.victim].kill()
            at = time.monotonic()
            seconds = {}
            while time.monotonic() - at < SECONDS_TO_END and len(seconds) < len(started) - 1:
                for number, process in enumerate(started):
                    if number != kill.victim and number not in seconds and process.poll() is not None:
                        seconds[number] = time.monotonic() - at
                time.sleep(POLL_SECONDS)
            time.sleep(0.3)  # until the exit reporters have printed
            problems = [*self._of_processes(kill, started), *self._of_checkpoints(before)]
            if found and "Resumed after" in self.log() and f"Resumed after step {found[-1]} of" not in self.log():
                problems.append(f"has not resumed after step {found[-1]}")
        finally:
            _end(started)
        return Outcome(Kill(moment, kill.victim), seconds, problems, memory)

    def complete(self) -> list[str]:
        """Completes the run and an uninterrupted one, and returns what is wrong."""
        last = self.steps[-1] + MORE_STEPS
        alone = Run(self.folder / "alone", self.processes, self.random)
        alone.folder.mkdir()
        for run in (self, alone):
            started = run.start("--steps", str(last), *(("--checkpoint-every", "0") if run is alone else ()))
            try:
                codes = [process.wait(TIMEOUT) for process in started]
            finally:
                _end(started)
            if any(codes):
                return [f"ended with {codes} instead of completing:\n{run.log()}"]
        expected = dict(alone.losses())
        different = [(step, loss) for step, loss in self.losses() if loss != expected.get(step, loss)]
        reached = {step for step, _ in self.losses()}
        problems = [f"step {step} has the loss {loss}, not {expected[step]}" for step, loss in different]
        return problems + [f"step {step} was never done" for step in range(1, last + 1) if step not in reached]

    def losses(self) -> Iterator[tuple[int, float]]:
        """Of every line in the metrics file; a kill may have left a part of one."""
        for line in self.metrics.read_text().splitlines():
            try:
                values = json.loads(line)
            except ValueError:
                continue
            if values["event"] == "step":
                yield values["step"], values["loss"]

    def _reach(self, phase: str, started: Sequence[subprocess.Popen[bytes]]) -> None:
        """Returns at a random moment of a phase."""
        self._until(started, lambda: "No accelerator" in self.log())
        joined = time.monotonic()
        if phase == "compile":
            time.sleep(self.random.uniform(0, 0.8 * self.compile_seconds))
            return
        if phase == "restore":  # which begins once the folder is taken, and lasts for milliseconds
            self._until(started, self._has_lock)
            time.sleep(self.random.uniform(0, 0.02))
            return
        self._until(started, lambda: "Compiled and initialised in" in self.log())
        self.compile_seconds = time.monotonic() - joined
        # The first of all kills comes here too, so that those in a restore have something to restore.
        self._until(started, lambda: "  loss " in self.log() and bool(self.steps))
        time.sleep(self.random.uniform(0, 1))
        self._until(started, lambda: self._is_saving() == (phase == "save"))
        if phase == "save":
            time.sleep(self.random.uniform(0, 0.01))

    def _phase(self, meant: str) -> str:
        if "Compiled and initialised in" not in self.log():
            return "restore" if meant == "restore" else "compile"
        return "save" if self._is_saving() else "step"

    def _has_lock(self) -> bool:
        lock = self.folder / "run" / LOCK
        return lock.exists() and lock.stat().st_mtime >= self.began

    def _is_saving(self) -> bool:
        return any((self.folder / "run").glob("*.partial"))

    def _until(self, started: Sequence[subprocess.Popen[bytes]], is_so: Callable[[], bool]) -> None:
        deadline = time.monotonic() + TIMEOUT
        while not is_so():
            if time.monotonic() > deadline or any(process.poll() is not None for process in started):
                raise AssertionError("\n".join(self.log(number) for number in range(self.processes)))
            time.sleep(POLL_SECONDS)

    def _of_processes(self, kill: Kill, started: Sequence[subprocess.Popen[bytes]]) -> Iterator[str]:
        saved = f"The newest checkpoint is step {self.steps[-1]} of run." if self.steps else "Nothing was saved."
        for number, process in enumerate(started):
            if number == kill.victim:
                continue
            code, end = process.poll(), self.log(number)[-2000:]
            if not code:
                yield f"process {number} ended with {code}:\n{end}"
            if "Traceback" in self.log(number):
                yield f"process {number} prints a traceback beside what happened:\n{self.log(number)[-6000:]}"
            if f"process {number} stops because process {kill.victim}" not in end or saved not in end:
                yield f"process {number} does not name process {kill.victim} and say {saved!r}:\n{end}"

    def _of_checkpoints(self, before: Sequence[int]) -> Iterator[str]:
        """A save may have been made, and the oldest removed; nothing else may have changed."""
        after = self.steps
        lost = [step for step in before[-3:] if step not in after and not (after and step < min(after))]
        if lost or len(after) < min(3, len(before)) or max(after, default=0) < max(before, default=0):
            yield f"of the checkpoints {before} there are {after}"
        for step in after:
            yield from (f"step {step}: {problem}" for problem in verify_checkpoint(self.folder / "run", step))


def kills(count: int, processes: int, generator: random.Random) -> list[Kill]:
    """So many kills, as equally as possible in every phase and of every process; first one in a step."""
    chosen = [Kill(PHASES[i % len(PHASES)], (i + i // len(PHASES)) % processes) for i in range(count)]
    generator.shuffle(chosen)
    first = next((kill for kill in chosen if kill.phase == "step"), chosen[0])
    chosen.remove(first)
    return [first, *chosen]


def table(outcomes: Sequence[tuple[int, Outcome]]) -> list[str]:
    """Seconds until the others had ended, by number of processes, phase and victim, in Markdown."""
    lines = ["| processes | killed in | process | kills | least | median | most |", "|---|---|---|---|---|---|---|"]
    groups: dict[tuple[int, str, str], list[Outcome]] = {}
    for processes, outcome in outcomes:
        victim = "0" if outcome.kill.victim == 0 else "another"
        groups.setdefault((processes, outcome.kill.phase, victim), []).append(outcome)
    for processes, phase, victim in sorted(groups, key=lambda key: (key[0], PHASES.index(key[1]), key[2])):
        found = groups[processes, phase, victim]
        seconds = [second for outcome in found for second in outcome.seconds.values()]
        numbers = f"{min(seconds):.1f} | {statistics.median(seconds):.1f} | {max(seconds):.1f}"
        lines.append(f"| {processes} | {phase} | {victim} | {len(found)} | {numbers} |")
    return lines


def campaign(folder: Path, processes: int, count: int, seed: int) -> tuple[list[Outcome], list[str]]:
    """Performs the kills, with progress messages; returns the outcomes and the faults found."""
    generator = random.Random(f"{seed} {processes}")
    run = Run(folder, processes, generator)
    outcomes, problems = [], []
    for number, kill in enumerate(kills(count, processes, generator), 1):
        outcome = run.round(kill)
        outcomes.append(outcome)
        times = ", ".join(f"{second:.1f}" for second in outcome.seconds.values())
        wrong = "; ".join(outcome.problems) or "good"
        print(f"{number}: process {kill.victim} of {processes} killed in {outcome.kill.phase}", flush=True)
        print(f"  others ended after {times} s; {outcome.megabytes} MB; steps {run.steps}: {wrong}", flush=True)
        problems += [f"{processes} processes, kill {number} ({kill}): {problem}" for problem in outcome.problems]
    return outcomes, problems + run.complete()


def _megabytes(process: subprocess.Popen[bytes]) -> int:
    """The most memory that a process has taken so far."""
    try:
        lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return max((int(line.split()[1]) // 1024 for line in lines if line.startswith("VmHWM")), default=0)


def _end(started: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in started:
        if process.poll() is None:
            process.kill()
        process.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description="Kills processes of a run at random moments.")
    parser.add_argument("--kills", type=int, default=44)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    flags = parser.parse_args()
    if flags.kills < len(flags.processes):
        parser.error("there must be a kill for each number of processes")
    outcomes, problems = [], []
    for processes in flags.processes:
        with tempfile.TemporaryDirectory() as folder:
            found, wrong = campaign(Path(folder), processes, flags.kills // len(flags.processes), flags.seed)
        outcomes += [(processes, outcome) for outcome in found]
        problems += wrong
    print("\n".join(["", *table(outcomes), "", *problems, f"{len(outcomes)} kills, {len(problems)} problems"]))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
