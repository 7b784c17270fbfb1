"""The commands of `meshpipe`, their flags and their exit codes."""

import difflib
import logging
import os
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
  plan RECIPE [flags] --compare             what every schedule would cost
  plan RECIPE --profile [flags]             what each layer costs on this machine, and a better cut
  launch --processes N [flags] -- train RECIPE [flags]   a run of N processes on this machine
  checkpoint list DIR                       what is saved, and from which layout
  checkpoint show DIR [--step N]            everything that is written down about one checkpoint
  checkpoint verify DIR                     whether every byte of it is good

RECIPE is FILE.py:FUNCTION, or FILE:FUNCTION for a file of the folder recipes/.
meshpipe COMMAND RECIPE --help shows the flags with their types, defaults and units.
Exit codes: 0 completed, 1 failed, 2 what was asked cannot be, 130 and 143 stopped by SIGINT and SIGTERM."""

COMPLETED, FAILED, CANNOT_BE, INTERRUPTED = 0, 1, 2, 130
DEVICES = "MESHPIPE_CPU_DEVICES"
"""Variable by which `launch` tells its processes how many virtual CPU devices each takes."""


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
    from meshpipe.distributed import DistributedConfig

    recipe, config, distributed = _configure("train", arguments, "Trains a recipe.", DistributedConfig())
    from meshpipe.coordination import process_count, process_index
    from meshpipe.distributed import Guard, join, leave, own_address
    from meshpipe.loop import run
    from meshpipe.pipeline.peers import open_peers
    from meshpipe.report import make_console
    from meshpipe.signals import StopRequest

    join(distributed)
    several = process_count() > 1
    console = make_console(quiet=process_index() > 0)
    try:
        with Guard(config.checkpoint.checkpoint_dir) as guard, StopRequest() as stop:
            _take_devices(config, console)
            if several:
                open_peers(own_address(distributed.coordinator))
            status = run(config, recipe, console, guard, stop, distributed.step_timeout)
    except ValueError as error:
        if not several:
            raise
        print(f"meshpipe: {error}{_origin(error)}", file=sys.stderr)
        status = CANNOT_BE
    if several:
        leave(status)
    return status


def launch(arguments: list[str]) -> int:
    """Starts the processes of one run on this machine; what follows `--` is the command of each."""
    own, separator, command = arguments, "--", []
    if separator in arguments:
        place = arguments.index(separator)
        own, command = arguments[:place], arguments[place + 1 :]
    flags = tyro.cli(_LaunchFlags, args=own, prog="meshpipe launch", description=launch.__doc__)
    if not command or command[0] != "train":
        got = f"Got {command[0]!r}." if command else "Got nothing after it."
        raise ValueError(f"The command after -- must be train: meshpipe launch --processes N -- train RECIPE. {got}")
    if flags.max_restarts and not any(argument.startswith("--checkpoint-dir") for argument in command):
        raise ValueError(
            f"A run is started again from its newest checkpoint. Got --max-restarts {flags.max_restarts} without "
            "--checkpoint-dir. Add --checkpoint-dir DIR after train RECIPE."
        )
    from meshpipe.launch import Launch, free_port

    port = 0

    def of_process(number: int, restart: int) -> list[str]:
        nonlocal port
        if number == 0:
            port = free_port(flags.address)
        place = ["--coordinator", f"{flags.address}:{port}", "--process-id", str(number)]
        place += ["--process-count", str(flags.processes)]
        again = []
        if restart and "--resume" not in command:  # of flags that are given twice, the last counts
            again = ["--auto-resume", "--resume-from", "None"]
        return [sys.executable, "-m", "meshpipe", *command, *place, *again]

    environment = {} if flags.devices_per_process is None else {DEVICES: str(flags.devices_per_process)}
    return Launch(flags.processes, of_process, flags.max_restarts, environment).run()


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
    extra.check(config)
    import jax

    from meshpipe.choose import Chooser, measuring_mesh
    from meshpipe.compare import compare_schedules
    from meshpipe.mesh import make_mesh, use_cpu_devices
    from meshpipe.picture import check_picture
    from meshpipe.profile_report import print_profile
    from meshpipe.report import make_console, print_comparison, print_plan

    if extra.plot is not None:
        check_picture(extra.plot)
    measures = extra.profile or (config.pipeline.needs_costs and config.pipeline.costs is None)
    platforms = os.environ.get("JAX_PLATFORMS", "") if measures else "cpu"
    if platforms:  # else JAX finds all there are
        jax.config.update("jax_platforms", platforms if "cpu" in platforms else f"{platforms},cpu")
    use_cpu_devices(config.mesh.num_devices)
    mesh = make_mesh(config.mesh.pipeline, config.mesh.data, config.mesh.tensor, devices=jax.devices("cpu"))
    chooser = Chooser.from_config(config, mesh=mesh, measure_on=measuring_mesh(config.mesh) if measures else None)
    console = make_console()
    costs = None
    if extra.profile:
        costs = chooser.measure()
        print_profile(console, costs, *chooser.before_and_after(costs))
        if extra.save_costs is not None:
            costs.save(extra.save_costs)
            console.print(f"Saved in {extra.save_costs}; --costs {extra.save_costs} takes them.\n")
    if extra.compare:
        print_comparison(console, recipe, config.pipeline, compare_schedules(chooser, costs))
        return COMPLETED
    model = chooser.choose(costs)
    print_plan(console, recipe, model, chooser.transformation, extra.plot)
    if extra.save_schedule is not None:
        extra.save_schedule.write_text(model.plan.to_text())
        console.print(f"\nWritten to {extra.save_schedule}; --schedule {extra.save_schedule} runs it.")
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
    "launch": launch,
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
    """Picture of the plan's timeline and memory to draw; its suffix says the format."""
    save_schedule: Path | None = None
    """File (.txt) to write the plan to, which --schedule takes, also after changes."""
    compare: bool = False
    """Instead of one plan, show what every schedule would cost; by measured costs with --profile or --costs."""
    profile: bool = False
    """Measure each layer on this machine, and show the cut that makes the slowest stage fastest."""
    save_costs: Path | None = None
    """JSON file for what `--profile` measures, which `--costs` reads."""

    def check(self, config: "Config") -> None:
        """Raises `ValueError` when the flags do not fit together, or a file cannot be written."""
        if self.profile and config.pipeline.costs is not None:
            raise ValueError(
                "--profile measures what --costs reads from a file. "
                f"Got both, with {config.pipeline.costs!r}. Leave one of them out."
            )
        if self.save_costs is not None and not self.profile:
            raise ValueError(f"--save-costs saves what --profile measures. Got {str(self.save_costs)!r} without it.")
        if self.compare and (self.plot or self.save_schedule):
            raise ValueError("--compare shows all schedules; --plot and --save-schedule show one. Give either.")
        if self.save_schedule is not None and self.save_schedule.suffix != ".txt":
            raise ValueError(
                "--save-schedule must name a file that ends in .txt, as --schedule does. "
                f"Got {str(self.save_schedule)!r}."
            )
        for flag, file in (("--save-costs", self.save_costs), ("--save-schedule", self.save_schedule)):
            if file is not None and (not file.parent.is_dir() or file.is_dir()):
                raise ValueError(
                    f"{flag} must name a file in a folder that exists. Got {str(file)!r}. "
                    "Make the folder, or name another file."
                )


@dataclass(frozen=True)
class _LaunchFlags:
    processes: int
    """Processes of the run."""
    devices_per_process: int | None = None
    """Virtual CPU devices of each; without it, those of the mesh are shared out evenly."""
    max_restarts: int = 0
    """How often a run that failed is started again, from its newest checkpoint if there is one by then."""
    address: str = "127.0.0.1"
    """Address of this machine that the processes listen at."""


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

    from meshpipe.coordination import process_count
    from meshpipe.mesh import use_cpu_devices

    count, processes = config.mesh.num_devices, process_count()
    per_process = int(os.environ.get(DEVICES, 0)) or -(-count // processes)
    use_cpu_devices(per_process)
    if jax.default_backend() == "cpu":
        if per_process * processes != count:
            raise ValueError(
                "On CPU, the devices of all processes must be those of the mesh. "
                f"Got {processes} processes of {per_process} for a mesh of {count}. Choose a divisor of {count}."
            )
        shared = f" of {processes} processes" if processes > 1 else ""
        console.print(f"No accelerator: running on {count} virtual CPU device{'s' if count > 1 else ''}{shared}.")


def _quiet_libraries() -> None:
    """Hides what libraries say to their own developers; an error still comes up as one."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
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
