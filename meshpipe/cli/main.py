"""Finds the command, runs it, and turns what goes wrong into a message and an exit code."""

import logging
import os
import sys
import warnings
from collections.abc import Sequence
from functools import partial

from meshpipe.accelerators import quiet_libtpu
from meshpipe.cli.advise import advise
from meshpipe.cli.arguments import Command, choose
from meshpipe.cli.checkpoint import checkpoint
from meshpipe.cli.data import data
from meshpipe.cli.doctor import doctor
from meshpipe.cli.endings import explained
from meshpipe.cli.evaluate import evaluate
from meshpipe.cli.generate import generate
from meshpipe.cli.init import init
from meshpipe.cli.launch import launch
from meshpipe.cli.metrics import metrics
from meshpipe.cli.output import lasting_output, loss_of_output, reader_is_gone
from meshpipe.cli.plan import plan
from meshpipe.cli.recipes import recipes
from meshpipe.cli.train import train
from meshpipe.cli.verify import verify
from meshpipe.cli.weights import weights
from meshpipe.errors import errors_name_flags
from meshpipe.processes.exit_codes import COMPLETED, FAILED, INTERRUPTED
from meshpipe.processes.stop import StopRequest, leave_now
from meshpipe.report.phases import showing_phases
from meshpipe.version import __version__

USAGE = """usage: meshpipe COMMAND ...

Train
  recipes                        list the recipes in recipes/, or meshpipe's
  init [DIR]                     copy meshpipe's recipes to DIR/recipes
  train RECIPE                   train
  launch --processes N -- train RECIPE
                                 run N processes on this machine
  verify RECIPE                  compare with plain training on one device
  metrics RUN...                 compare runs: losses, throughput, status

Choose a layout
  plan RECIPE                    show stages, schedule, bubble and memory
  plan RECIPE --compare          compare all schedules
  plan RECIPE --profile          measure each layer, suggest a better partition
  plan RECIPE --target gpu:h100:8
                                 compile for devices that need not be here
  plan --measure-machine FILE.json
                                 measure this machine's devices, for --target
  advise RECIPE --target gpu:h100:8
                                 find the fastest layout, say why others lose

Use a trained model, or published weights
  generate FOLDER --prompt TEXT  continue texts
  eval FOLDER                    loss, perplexity and metrics on held-out data
  weights import FOLDER --to CHECKPOINTS
                                 write published weights as a checkpoint
  weights export CHECKPOINTS --to FOLDER
                                 write a checkpoint for transformers to load
  checkpoint list DIR            list checkpoints and their layouts
  checkpoint show DIR            show all metadata of one
  checkpoint verify DIR          compare every byte with its checksum

Prepare data
  data prepare SOURCES...        tokenize text and pack it into windows
  data show DIR                  what a prepared folder has, windows as text
  data verify DIR                compare every byte with its checksum

  doctor                         show versions, devices, and what is missing
  --version                      show the version

RECIPE is FILE.py:FUNCTION, or FILE:FUNCTION for a file in recipes/, or for one
of meshpipe's where there is no such folder. After COMMAND RECIPE, --help shows
the common flags with types, defaults and units; --help-all shows all flags.
Exit codes: 0 completed, 1 failed, 2 invalid request; 130, 143 and 129 stopped
by SIGINT, SIGTERM and SIGHUP."""


def _commands(stop: StopRequest) -> dict[str, Command]:
    return {
        "recipes": recipes,
        "init": init,
        "train": partial(train, stop=stop),
        "verify": verify,
        "plan": plan,
        "advise": advise,
        "generate": partial(generate, stop=stop),
        "eval": partial(evaluate, stop=stop),
        "metrics": metrics,
        "launch": launch,
        "checkpoint": checkpoint,
        "data": data,
        "weights": weights,
        "doctor": doctor,
    }


STOPPED_TRAINING = "stopped before the first step; nothing was saved."
"""What `train` says after a signal before there is anything to save."""
PARENTS = ("launch", "doctor")
"""Commands that end their child processes themselves after a signal, and take their time."""
RUNS = ("train", "launch")
"""Commands that continue without standard output, with a warning; the other commands exist only for their output."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    command, *rest = (sys.argv[1:] if arguments is None else arguments) or [""]
    with lasting_output(say=command in RUNS) as line:
        stop = StopRequest(end_early=leave_now, early=STOPPED_TRAINING if command == "train" else "stopped.")
        if command in PARENTS:
            return _unless_lost(_run(command, rest, _commands(stop)), command)
        with stop, showing_phases(line, on_stderr=command not in RUNS):  # before JAX is imported
            return _unless_lost(_run(command, rest, _commands(stop)), command)


def _unless_lost(code: int, command: str) -> int:
    """The exit code; that of a failure where a command exists for its output, and that could not be written."""
    if sys.stdout is not None:
        sys.stdout.flush()
    lost = loss_of_output()
    return FAILED if code == COMPLETED and command not in RUNS and lost and not reader_is_gone(lost) else code


def _run(command: str, rest: list[str], commands: dict[str, Command]) -> int:
    if command in ("-h", "--help"):
        print(USAGE)
        return COMPLETED
    if command in ("-V", "--version"):
        print(f"meshpipe {__version__}")
        return COMPLETED
    _quiet_libraries()
    try:
        with errors_name_flags():
            return choose(command, commands, "meshpipe")(rest)
    except KeyboardInterrupt:
        return INTERRUPTED
    except (Exception, SystemExit) as error:
        status = explained(command, error)
        if status is None:
            raise
        return status


def _quiet_libraries() -> None:
    """Hides log messages of libraries that are meant for their developers; errors are still raised."""
    # JAX sets 1 by default.
    if os.environ.get("TF_CPP_MIN_LOG_LEVEL", "1") == "1":
        os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"
    quiet_libtpu()
    for library in ("absl", "orbax", "grain", "flax", "optax", "jax", "etils", "tensorstore"):
        warnings.filterwarnings("ignore", module=rf"{library}\b")
    logging.getLogger("absl").setLevel(logging.ERROR)
