"""`meshpipe verify`."""

import sys
from dataclasses import dataclass

from meshpipe.cli.arguments import configure
from meshpipe.cli.devices import take_devices
from meshpipe.errors import check_whole
from meshpipe.phases import phase
from meshpipe.processes.exit_codes import COMPLETED, FAILED


@dataclass(frozen=True)
class _VerifyFlags:
    updates: int = 3
    """Updates to compare, each on its own batch."""

    def __post_init__(self) -> None:
        check_whole("updates", self.updates, below=100_001)


def verify(arguments: list[str]) -> int:
    _, config, extra = configure(
        "verify", arguments, "Compares a recipe at its layout with plain training on one device.", _VerifyFlags()
    )
    with phase("Importing JAX"):
        from meshpipe.host import keep_freed_memory
        from meshpipe.reference.verify import verify_recipe
        from meshpipe.report.plan import difference_table
        from meshpipe.report.tables import make_console

    console = make_console()
    take_devices(config.mesh, console)
    keep_freed_memory()
    report = verify_recipe(config, extra.updates)
    updates = f"{extra.updates} update{'s' if extra.updates > 1 else ''}"
    console.print(f"Compared over {updates} with plain training of {report.reference} on one device.", markup=False)
    console.print(difference_table(report.worst_by_layer().values()))
    first = report.first
    if first is None:
        console.print(f"Equal to plain training on one device; relative tolerance {report.tolerance:.1g}.")
        return COMPLETED
    what = f"{first.quantity} {first.path}".strip()
    when = f"in update {first.update}" if first.update else "before the first update"
    print(
        f"meshpipe: the first difference is in {first.layer}: {what} differs {when} by {first.found:.3g}, "
        f"with {first.allowed:.3g} allowed.",
        file=sys.stderr,
    )
    return FAILED
