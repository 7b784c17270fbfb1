"""The commands of `meshpipe`, their flags and their exit codes."""

import difflib
import logging
import sys
import sysconfig
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, make_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

# JAX and what builds on it takes seconds to import, so a command imports what it needs once it knows that it does.
if TYPE_CHECKING:
    from rich.console import Console

    from meshpipe.config import Config

USAGE = """usage: meshpipe COMMAND ...

  recipes                                   what the folder recipes/ offers
  train RECIPE [flags]                      train
  verify RECIPE [flags]                     compare with plain training on one device
  plan RECIPE [flags] [--plot FILE.png]     stages, schedule, bubble and memory; runs no step
  checkpoint list DIR                       what is saved, and from which layout
  checkpoint show DIR [--step N]            everything that is written down about one checkpoint
  checkpoint verify DIR                     whether every byte of it is good

RECIPE is FILE.py:FUNCTION, or FILE:FUNCTION for a file of the folder recipes/.
meshpipe COMMAND RECIPE --help shows the flags with their types, defaults and units.
Exit codes: 0 completed, 1 failed, 2 what was asked cannot be, 130 and 143 stopped by SIGINT and SIGTERM."""

COMPLETED, FAILED, CANNOT_BE, INTERRUPTED = 0, 1, 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code."""
    command, *rest = (sys.argv[1:] if arguments is None else arguments) or [""]
    if command in ("-h", "--help"):
        print(USAGE)
        return COMPLETED
    _quiet_libraries()
    try:
        return _choose(command, COMMANDS, "meshpipe")(rest)
    except SystemExit as end:  # from tyro, after --help or a wrong flag
        return end.code if isinstance(end.code, int) else COMPLETED
    except ValueError as error:
        print(f"meshpipe: {error}{_origin(error)}", file=sys.stderr)
        return CANNOT_BE
    except KeyboardInterrupt:
        return INTERRUPTED


def recipes(arguments: list[str]) -> int:
    """Lists the recipes of the current folder; one that fails is told on standard error, with exit code 2."""
    tyro.cli(_Nothing, args=arguments, prog="meshpipe recipes", description="Lists what the folder recipes/ offers.")
    from meshpipe.recipe import RecipeError, discover
    from meshpipe.report import make_console, make_table

    table = make_table(
        "recipe", "pipeline", "data", "tensor", "devices", "about", right=("pipeline", "data", "tensor", "devices")
    )
    failures = []
    for recipe in discover():
        try:
            mesh = recipe.config().mesh
        except RecipeError as failure:
            failures.append(failure)
            continue
        sizes = (mesh.pipeline, mesh.data, mesh.tensor, mesh.num_devices)
        table.add_row(recipe.name, *map(str, sizes), recipe.summary)
    make_console().print(table)
    for error in failures:
        print(f"meshpipe: {error}", file=sys.stderr)
    return CANNOT_BE if failures else COMPLETED


def train(arguments: list[str]) -> int:
    recipe, config, _ = _configure("train", arguments, "Trains a recipe.")
    from meshpipe.loop import run
    from meshpipe.report import make_console

    console = make_console()
    _take_devices(config, console)
    return run(config, recipe, console)


def verify(arguments: list[str]) -> int:
    _, config, extra = _configure(
        "verify", arguments, "Compares a recipe at its layout with plain training on one device.", _VerifyFlags()
    )
    from meshpipe.report import difference_table, make_console
    from meshpipe.verify import verify_recipe

    console = make_console()
    _take_devices(config, console)
    report = verify_recipe(config, extra.updates)
    console.print(difference_table(report.worst_by_layer().values()))
    first = report.first
    if first is None:
        compared = f"over {extra.updates} update{'s' if extra.updates > 1 else ''}"
        console.print(f"Equal to plain training on one device {compared}; relative tolerance {report.tolerance:.1g}.")
        return COMPLETED
    what = f"{first.quantity} {first.path}".strip()
    when = f"in update {first.update}" if first.update else "before the first update"
    print(
        f"meshpipe: the first difference is in {first.layer}: {what} differs {when} by {first.found:.3g}, "
        f"with {first.allowed:.3g} allowed.",
        file=sys.stderr,
    )
    return FAILED


def plan(arguments: list[str]) -> int:
    """Shows what a recipe would do; virtual CPU devices stand for any number of real ones, and hold nothing."""
    recipe, config, extra = _configure(
        "plan", arguments, "Shows stages, schedule, bubble and memory; runs no step.", _PlanFlags()
    )
    import jax

    from meshpipe.choose_remat import settle_remat
    from meshpipe.mesh import use_cpu_devices
    from meshpipe.report import check_picture, make_console, print_plan
    from meshpipe.staged_model import StagedModel

    if extra.plot is not None:
        check_picture(extra.plot)
    jax.config.update("jax_platforms", "cpu")
    use_cpu_devices(config.mesh.num_devices)
    model, transformation = StagedModel.from_config(config), config.optimizer.build(config.steps)
    settle_remat(model, transformation)
    print_plan(make_console(), recipe, model, transformation, extra.plot)
    return COMPLETED


def checkpoint(arguments: list[str]) -> int:
    if arguments and arguments[0] in ("-h", "--help"):
        print(USAGE)
        return COMPLETED
    name, *rest = arguments or [""]
    return _choose(name, CHECKPOINT_COMMANDS, "meshpipe checkpoint")(rest)


Command = Callable[[list[str]], int]
COMMANDS: dict[str, Command] = {
    "recipes": recipes,
    "train": train,
    "verify": verify,
    "plan": plan,
    "checkpoint": checkpoint,
}


def checkpoint_list(arguments: list[str]) -> int:
    flags = tyro.cli(_Folder, args=arguments, prog="meshpipe checkpoint list", description="Lists whole checkpoints.")
    from meshpipe.checkpoint import CheckpointError, CheckpointInfo, describe_checkpoint, list_checkpoints
    from meshpipe.checkpoint_report import checkpoint_table
    from meshpipe.report import make_console

    whole: list[CheckpointInfo] = []
    damaged: list[str] = []
    for step in list_checkpoints(flags.directory):
        try:
            whole.append(describe_checkpoint(flags.directory, step))
        except CheckpointError as error:
            damaged.append(str(error))
    make_console().print(checkpoint_table(whole))
    for message in damaged:
        print(f"meshpipe: {message}", file=sys.stderr)
    return FAILED if damaged else COMPLETED


def checkpoint_show(arguments: list[str]) -> int:
    description = "Shows everything that is written down about one checkpoint."
    flags = tyro.cli(_FolderAndStep, args=arguments, prog="meshpipe checkpoint show", description=description)
    from meshpipe.checkpoint import describe_checkpoint, list_checkpoints
    from meshpipe.checkpoint_report import print_checkpoint
    from meshpipe.report import make_console

    step = list_checkpoints(flags.directory)[-1] if flags.step is None else flags.step
    print_checkpoint(make_console(), describe_checkpoint(flags.directory, step))
    return COMPLETED


def checkpoint_verify(arguments: list[str]) -> int:
    description = "Compares every byte of the checkpoints with the checksums written when they were saved."
    flags = tyro.cli(_FolderAndStep, args=arguments, prog="meshpipe checkpoint verify", description=description)
    from meshpipe.checkpoint import list_checkpoints, verify_checkpoint

    steps = list_checkpoints(flags.directory) if flags.step is None else [flags.step]
    problems = {step: verify_checkpoint(flags.directory, step) for step in steps}
    for step, found in problems.items():
        print(f"step {step}: {'; '.join(found) if found else 'every byte is good'}")
    return FAILED if any(problems.values()) else COMPLETED


CHECKPOINT_COMMANDS: dict[str, Command] = {
    "list": checkpoint_list,
    "show": checkpoint_show,
    "verify": checkpoint_verify,
}


@dataclass(frozen=True)
class _Nothing:
    """No flags."""


def _choose(name: str, commands: dict[str, Command], program: str) -> Command:
    if name in commands:
        return commands[name]
    near = difflib.get_close_matches(name, commands, n=1)
    got = f"Got {name!r}." if name else "Got none."
    suggestion = f" Did you mean {near[0]}?" if near else f" `{program} --help` explains them."
    raise ValueError(f"The command must be one of {', '.join(commands)}. {got}{suggestion}")


def _configure(command: str, arguments: list[str], description: str, extra: Any = None) -> tuple[str, "Config", Any]:
    """The recipe's name, its configuration with the flags applied, and the command's own flags in place of `extra`.

    Raises `ValueError` for an unknown recipe, and `SystemExit` after `--help` or a wrong flag.
    """
    if arguments and arguments[0] in ("-h", "--help"):
        print(f"usage: meshpipe {command} RECIPE [flags]\n\n{description}")
        print("`meshpipe recipes` lists the recipes of this folder; a recipe followed by --help shows its flags.")
        raise SystemExit(COMPLETED)
    if not arguments or arguments[0].startswith("-"):
        got = f"Got {arguments[0]!r} in its place." if arguments else "Got none."
        raise ValueError(
            f"A recipe comes first: meshpipe {command} RECIPE [flags]. {got} `meshpipe recipes` lists what there is."
        )
    from meshpipe.config import Config
    from meshpipe.recipe import find

    recipe = find(arguments[0])
    fields: list[Any] = [("config", Annotated[Config, _WITHOUT_PREFIX], recipe.config())]
    if extra is not None:
        fields.append(("extra", Annotated[type(extra), _WITHOUT_PREFIX], extra))
    flags = make_dataclass("Flags", [(name, kind, field(default=default)) for name, kind, default in fields])
    chosen: Any = tyro.cli(
        flags,
        args=arguments[1:],
        prog=f"meshpipe {command} {arguments[0]}",
        description=f"{description} {recipe.summary}".strip(),
    )
    return recipe.name, chosen.config, getattr(chosen, "extra", None)


_WITHOUT_PREFIX = tyro.conf.arg(name="")


@dataclass(frozen=True)
class _Folder:
    directory: tyro.conf.Positional[Path]
    """Folder of a run's checkpoints."""


@dataclass(frozen=True)
class _FolderAndStep:
    directory: tyro.conf.Positional[Path]
    """Folder of a run's checkpoints."""
    step: int | None = None
    """One step; without it, the newest to show, and all to verify."""


@dataclass(frozen=True)
class _PlanFlags:
    plot: Path | None = None
    """Picture of the plan's timeline to draw; its suffix says the format."""


@dataclass(frozen=True)
class _VerifyFlags:
    updates: int = 3
    """Updates to compare, each on a batch of its own."""

    def __post_init__(self) -> None:
        if self.updates < 1:
            raise ValueError(f"--updates must be at least 1. Got {self.updates}.")


def _take_devices(config: "Config", console: "Console") -> None:
    """Without an accelerator, gives JAX as many virtual CPU devices as the mesh needs, and says so."""
    import jax

    from meshpipe.mesh import use_cpu_devices

    count = config.mesh.num_devices
    use_cpu_devices(count)
    if jax.default_backend() == "cpu":
        console.print(f"No accelerator: running on {count} virtual CPU device{'s' if count > 1 else ''}.")


def _quiet_libraries() -> None:
    """Hides what libraries say to their own developers; an error still comes up as one."""
    for library in ("absl", "orbax", "grain", "flax", "optax", "jax", "etils", "tensorstore"):
        warnings.filterwarnings("ignore", module=rf"{library}\b")
    logging.getLogger("absl").setLevel(logging.ERROR)


def _origin(error: ValueError) -> str:
    """The user's line that a library complains of: such a message knows neither meshpipe nor the layer."""
    paths = sysconfig.get_paths()
    libraries = ("<", paths["stdlib"], paths["purelib"], paths["platlib"])
    own = Path(__file__).parent
    frames = traceback.extract_tb(error.__traceback__)
    inside = [f for f in frames if own in Path(f.filename).parents or not f.filename.startswith(libraries)]
    if inside[-1] is frames[-1]:
        return ""
    return f" ({inside[-1].filename}, line {inside[-1].lineno})"
