"""`meshpipe init`."""

import shlex
from dataclasses import dataclass
from pathlib import Path

import tyro

from meshpipe.cli.arguments import parse
from meshpipe.errors import ArgumentError
from meshpipe.files import expand_fields
from meshpipe.processes.exit_codes import COMPLETED


@dataclass(frozen=True)
class _InitFlags:
    directory: tyro.conf.Positional[Path] = Path()
    """Folder to write to; the recipes go to its subfolder recipes/."""

    def __post_init__(self) -> None:
        expand_fields(self, "directory")


def init(arguments: list[str]) -> int:
    """Copies the recipes that come with meshpipe into a folder, and overwrites nothing."""
    flags = parse(_InitFlags, arguments, "meshpipe init", "Copies the recipes of meshpipe, to be changed.")
    from meshpipe.runs.recipe import FOLDER, shipped

    folder = flags.directory / FOLDER
    sources = sorted(shipped().glob("*.py"))
    taken = [file for file in sources if (folder / file.name).exists()]
    if taken:
        names = ", ".join(str(FOLDER / file.name) for file in taken)
        raise ArgumentError(
            f"`meshpipe init` overwrites nothing. Got {flags.directory}, where {names} "
            f"exist{'s' if len(taken) == 1 else ''}. Choose another folder."
        )
    written: list[Path] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for source in sources:
            with (folder / source.name).open("xb") as copy:
                written.append(folder / source.name)
                copy.write(source.read_bytes())
    except OSError as error:
        for file in written:
            file.unlink(missing_ok=True)
        raise ArgumentError(
            f"`meshpipe init` needs a folder that it can write to. Got {flags.directory}: {error.strerror}."
        ) from None
    for file in written:
        print(f"wrote {file}")
    change = "" if flags.directory == Path() else f"cd {shlex.quote(str(flags.directory))} && "
    print(f"Change them as you like. Next: {change}meshpipe train text_classifier:pipeline")
    return COMPLETED
