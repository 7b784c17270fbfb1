"""`meshpipe plan --measure-machine FILE`."""

import json
from dataclasses import dataclass
from pathlib import Path

from meshpipe.cli.arguments import parse
from meshpipe.errors import check_whole
from meshpipe.files import check_file, expand_fields, writing_whole
from meshpipe.hardware.catalogue import FILE_SUFFIX
from meshpipe.machine import format_bytes, usable_cores
from meshpipe.phases import phase
from meshpipe.processes.exit_codes import COMPLETED

FLAG = "--measure-machine"


@dataclass(frozen=True, kw_only=True)
class _Flags:
    measure_machine: Path
    """JSON file to write the description of this machine's devices to, for use as --target FILE.json:8."""
    devices: int | None = None
    """Number of virtual CPU devices, where there is no accelerator; by default one for each core."""

    def __post_init__(self) -> None:
        expand_fields(self, "measure_machine")

    def check(self) -> None:
        """Raises `ValueError` when a value or the file cannot be."""
        if self.devices is not None:
            check_whole("devices", self.devices)
        if self.measure_machine.suffix != FILE_SUFFIX:
            raise ValueError(
                f"{FLAG} must name a file that ends in {FILE_SUFFIX}, by which --target knows it. "
                f"Got {str(self.measure_machine)!r}."
            )
        check_file("measure_machine", self.measure_machine)


def is_asked(arguments: list[str]) -> bool:
    """Whether these are the arguments of `plan` that measure the machine."""
    return any(argument.partition("=")[0].replace("_", "-") == FLAG for argument in arguments)


def measure(arguments: list[str]) -> int:
    """Measures the devices that are here, and writes them down as a machine that `--target` can name."""
    if not arguments[0].startswith("-"):
        raise ValueError(
            f"{FLAG} measures this machine, whatever will run on it, so it takes no recipe. Got {arguments[0]!r}. "
            f"Leave it out: meshpipe plan {FLAG} FILE{FILE_SUFFIX}"
        )
    flags = parse(_Flags, arguments, "meshpipe plan", "Measures products, memory and links of the devices here.")
    flags.check()
    with phase("Importing JAX"):
        import jax

        from meshpipe.host import keep_freed_memory
        from meshpipe.mesh import use_cpu_devices
        from meshpipe.observe.machine_rates import measure_machine
        from meshpipe.report.tables import make_console, print_text
    use_cpu_devices(flags.devices or max(1, round(usable_cores())))
    keep_freed_memory()  # as a run does
    devices = jax.devices()
    if flags.devices is not None and devices[0].platform == "cpu":
        devices = devices[: flags.devices]
    found = measure_machine(flags.measure_machine.stem, devices)
    with writing_whole("measure_machine", flags.measure_machine) as partial:
        partial.write_text(json.dumps(found, indent=2) + "\n")
    shares = found["efficiency"]
    rates = ", ".join(f"{dtype} {rate * shares['products'] / 1e12:.3g}" for dtype, rate in found["flops"].items())
    console = make_console()
    console.print(f"{len(devices)} x {found['device_kind']}, each of them:", markup=False)
    for what, text in (
        ("products", f"{rates} TFLOP/s"),
        (
            "memory",
            f"{format_bytes(found['memory_bytes'])}, {format_bytes(found['memory_bandwidth'] * shares['memory'])}/s",
        ),
        (
            "links",
            f"{format_bytes(found['host_link'] * shares['links'])}/s, {found['host_latency'] * 1e6:.3g} microseconds",
        ),
    ):
        console.print(f"  {what:9} {text}", markup=False, soft_wrap=True)
    for text in found["sources"][1:]:
        print_text(console, text)
    print_text(
        console, f"Saved to {flags.measure_machine}; use it with --target {flags.measure_machine}:{len(devices)}."
    )
    return COMPLETED
