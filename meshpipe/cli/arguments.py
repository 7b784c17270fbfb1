"""Parses the arguments of a command into a recipe, its configuration and the command's own flags."""

import difflib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import field, make_dataclass
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import tyro

from meshpipe.cli.flags import Flag, flags_of, suggestion
from meshpipe.cli.help import HELP, HELP_ALL, common_page, page_of, whole_page
from meshpipe.phases import phase
from meshpipe.processes.exit_codes import COMPLETED

# JAX and the packages built on it take seconds to import, so commands import them only when they need them.
if TYPE_CHECKING:
    from meshpipe.config import Config

Command = Callable[[list[str]], int]
_WITHOUT_PREFIX = tyro.conf.arg(name="")
PARTS_OF_RUNS = {"checkpoint", "observe"}
FLAGS_OF_RUNS = {"metrics", "trace", "run-dir", "measure-every", "eval-every", "eval-batches", "skip-nonfinite"}
"""What concerns `train` alone."""


def choose(name: str, commands: dict[str, Command], program: str) -> Command:
    if name in commands:
        return commands[name]
    near = difflib.get_close_matches(name, commands, n=1)
    got = f"Got {name!r}." if name else "Got none."
    suggestion = f" Did you mean {near[0]}?" if near else f" `{program} --help` explains them."
    raise ValueError(f"The command must be one of {', '.join(commands)}. {got}{suggestion}")


def run_one_of(commands: dict[str, Command], arguments: list[str], program: str, usage: str) -> int:
    """Runs the command that the first argument names, or prints the usage of all."""
    if arguments and arguments[0] in HELP:
        print(usage)
        return COMPLETED
    name, *rest = arguments or [""]
    return choose(name, commands, program)(rest)


class ParserExit(Exception):
    """The parser has printed help or an error; the command exits with `code`."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


def parse(flags: Any, arguments: list[str], program: str, description: str | None) -> Any:
    """Parses arguments into an instance of the dataclass `flags`. Raises `ParserExit` after `--help` or a wrong flag.

    The parser's own `SystemExit` could be mistaken for one of the user's code.
    """
    page = page_of(flags) if any(name in arguments for name in HELP) else flags
    return _parsed(page, arguments, program, description)


def _parsed(flags: Any, arguments: list[str], program: str, description: str | None) -> Any:
    with _parser_exits():
        return tyro.cli(flags, args=arguments, prog=program, description=description)


@contextmanager
def _parser_exits() -> Iterator[None]:
    try:
        yield
    except SystemExit as end:
        raise ParserExit(end.code if isinstance(end.code, int) else COMPLETED) from None


def configure(command: str, arguments: list[str], description: str, extra: Any = None) -> tuple[str, "Config", Any]:
    """The recipe's name, its configuration with the flags applied, and the command's own flags in place of `extra`.

    Calls `extra.check(config)` if there is such a method.

    Raises `ValueError` for an unknown recipe or flag, and `ParserExit` after `--help` or a wrong value.
    """
    if arguments and arguments[0] in (*HELP, HELP_ALL):
        _print_own_help(command, description, None if command == "train" else extra)
    if not arguments or arguments[0].startswith("-"):
        got = f"Got {arguments[0]!r} in its place." if arguments else "Got none."
        raise ValueError(
            f"The first argument must be a recipe: meshpipe {command} RECIPE [flags]. {got} "
            "`meshpipe recipes` lists them."
        )
    with phase("Importing JAX"):
        from meshpipe.config import Config
        from meshpipe.runs.recipe import find
        from meshpipe.weights.published_model import PublishedModel

    recipe = find(arguments[0])
    config = recipe.config()
    program, description = f"meshpipe {command} {arguments[0]}", f"{description} {recipe.summary}".strip()
    flags = flags_of(config) + (
        [] if extra is None else flags_of(extra, "processes" if command == "train" else command)
    )
    if HELP_ALL in arguments or any(name in arguments for name in HELP):
        _print_help(flags, command, HELP_ALL in arguments, program, description)
    fields: list[Any] = [("config", Annotated[Config, _WITHOUT_PREFIX], config)]
    if extra is not None:
        fields.append(("extra", Annotated[type(extra), _WITHOUT_PREFIX], extra))
    kind = make_dataclass("Flags", [(name, kind, field(default=default)) for name, kind, default in fields])
    chosen: Any
    with _parser_exits():
        chosen, unknown = tyro.cli(kind, args=arguments[1:], prog=program, return_unknown_args=True)
    if unknown:
        _refuse(unknown, [flag.name for flag in flags], command)
    check = getattr(getattr(chosen, "extra", None), "check", None)
    if check is not None:
        check(chosen.config)
    if command not in ("train", "advise"):  # what advise writes down is for a run
        is_published = isinstance(config.model, PublishedModel)
        _tell_unused(command, flags_of(config), flags_of(chosen.config), used=("init-from",) if is_published else ())
    return recipe.name, chosen.config, getattr(chosen, "extra", None)


def _tell_unused(command: str, before: Sequence[Flag], after: Sequence[Flag], used: Sequence[str]) -> None:
    """Prints which of the flags that were given concern a run alone, except for those that this recipe's model uses."""
    values = {flag.name: flag.default for flag in before}
    unused = [
        f"--{flag.name}"
        for flag in after
        if (flag.part in PARTS_OF_RUNS or flag.name in FLAGS_OF_RUNS) and flag.name not in used
        if flag.default != values[flag.name]
    ]
    if unused:
        print(f"meshpipe: {command} makes no run, so it does not use {', '.join(unused)}.", file=sys.stderr)


def _print_own_help(command: str, description: str, extra: Any) -> NoReturn:
    """Prints the help of a command without a recipe, and raises `ParserExit`."""
    more = "`meshpipe recipes` lists the recipes; add --help after one to see its flags."
    if extra is None:
        print(f"usage: meshpipe {command} RECIPE [flags]\n\n{description}\n{more}")
        raise ParserExit(COMPLETED)
    try:
        parse(type(extra), ["--help"], f"meshpipe {command} RECIPE", description)
    except ParserExit:
        print(more)
        raise
    raise AssertionError("the parser exits after --help")


def _print_help(flags: Sequence[Flag], command: str, whole: bool, program: str, description: str) -> NoReturn:
    """Prints the help of a command with a recipe, and raises `ParserExit`."""
    page = whole_page(flags) if whole else common_page(flags, command)
    try:
        _parsed(page, ["--help"], program, description)
    except ParserExit:
        if not whole:
            print(f"{HELP_ALL} shows all {len(flags)} flags, among them those of the model and the data.")
        raise
    raise AssertionError("the parser exits after --help")


def _refuse(unknown: Sequence[str], known: Sequence[str], command: str) -> NoReturn:
    """Raises `ValueError` for arguments that are no flags, with the flag that was probably meant."""
    first = next((argument for argument in unknown if argument.startswith("-")), unknown[0])
    if not first.startswith("-"):
        raise ValueError(f"After the recipe come flags. Got {first!r}. meshpipe {command} RECIPE --help lists them.")
    name = first.partition("=")[0]
    raise ValueError(
        f"There is no flag {name} for {command} with this recipe.{suggestion(name, known)} "
        f"meshpipe {command} RECIPE {HELP_ALL} lists all flags."
    )
