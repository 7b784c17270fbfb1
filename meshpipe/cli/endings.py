"""Turns what ends a command into a message and an exit code."""

import sys
import sysconfig
import traceback
from pathlib import Path

from meshpipe.cli.arguments import ParserExit
from meshpipe.errors import advice_on, is_for_the_user
from meshpipe.processes.exit_codes import FAILED, INVALID


def explained(command: str, error: BaseException) -> int | None:
    """Prints what ended a command, and returns its exit code; None for an error that needs its traceback."""
    if isinstance(error, ParserExit):
        return error.code
    if isinstance(error, SystemExit):  # from the user's code
        print(f"meshpipe: {command} was ended by sys.exit{call_of_exit(error)}.", file=sys.stderr)
        return error.code if isinstance(error.code, int) and error.code else FAILED
    if isinstance(error, Exception) and is_for_the_user(error):
        print(f"meshpipe: {explanation(error)}", file=sys.stderr)
        return INVALID
    return None


def call_of_exit(end: SystemExit) -> str:
    """The arguments of a `sys.exit`, and where it was called."""
    frames = traceback.extract_tb(end.__traceback__)
    return f"({'' if end.code is None else repr(end.code)}) in {frames[-1].filename}, line {frames[-1].lineno}"


def explanation(error: Exception) -> str:
    """The message of an error, its origin, and its notes."""
    kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
    return "\n".join((f"{kind}{error}{_origin(error)}", *advice_on(error)))


def _origin(error: Exception) -> str:
    """The user's line that made a library raise the error; the library's message does not name it."""
    paths = sysconfig.get_paths()
    libraries = ("<", paths["stdlib"], paths["purelib"], paths["platlib"])
    own = Path(__file__).parent
    frames = traceback.extract_tb(error.__traceback__)
    inside = [f for f in frames if own in Path(f.filename).parents or not f.filename.startswith(libraries)]
    if inside[-1] is frames[-1]:
        return ""
    return f" ({inside[-1].filename}, line {inside[-1].lineno})"
