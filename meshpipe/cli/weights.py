"""`meshpipe weights`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from meshpipe.cli.arguments import Command, parse, run_one_of
from meshpipe.errors import ArgumentError, check_whole
from meshpipe.files import expand_fields
from meshpipe.processes.exit_codes import COMPLETED

USAGE = """usage: meshpipe weights import FOLDER --to CHECKPOINTS
       meshpipe weights export CHECKPOINTS --to FOLDER [--step N] [--dtype NAME] [--adapters] [flags]

import reads published weights (config.json and safetensors files) and writes them as step 0 of a checkpoint folder.
export writes a checkpoint as published weights, which transformers loads. train --init-from FOLDER needs no import."""


@dataclass(frozen=True, kw_only=True)
class _Import:
    folder: tyro.conf.Positional[Path]
    """Folder with config.json and safetensors files, or with PEFT adapters (adapter_config.json)."""
    to: Path
    """Folder for the checkpoint, made when missing. It must not contain checkpoints."""
    base: Path | None = None
    """Folder of the weights below the adapters. None takes the one that adapter_config.json names."""

    def __post_init__(self) -> None:
        expand_fields(self, "folder", "to", "base")


@dataclass(frozen=True, kw_only=True)
class _Export:
    checkpoints: tyro.conf.Positional[Path]
    """The `--run-dir` or `--checkpoint-dir` of a run, or a folder that `weights import` wrote."""
    to: Path
    """Output folder, made when missing; it must be empty."""
    step: int | None = None
    """Step to export; None takes the newest."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype of the tensors. `auto` keeps that of the weights that the run began with, or float32."""
    like: Path | None = None
    """Folder to take config.json and the tokenizer from. None takes those of the weights that the run began with."""
    base: Path | None = None
    """Folder of the adapters' base, into which they are merged. None takes the one that the run used."""
    adapters: bool = False
    """Export the adapters alone, in PEFT's format. `--base` is then the name of their base in adapter_config.json."""
    largest_file: int = 5_000_000_000
    """Most bytes of a file; larger exports are split into several files."""

    def __post_init__(self) -> None:
        expand_fields(self, "checkpoints", "to", "like", "base")
        check_whole("largest_file", self.largest_file)


def weights_import(arguments: list[str]) -> int:
    about = "Writes published weights as a checkpoint."
    flags = parse(_Import, arguments, "meshpipe weights import", about)
    from meshpipe.exchange.importing import import_weights
    from meshpipe.phases import phase
    from meshpipe.report.tables import format_bytes
    from meshpipe.weights import WeightsFolder

    if (flags.folder / "adapter_config.json").is_file() and not (flags.folder / "config.json").is_file():
        return _import_adapters(flags)
    if flags.base is not None:
        raise ArgumentError(f"`base` is for adapters of PEFT. Got it with {flags.folder}. Leave it out.")
    weights = WeightsFolder(flags.folder)
    size = format_bytes(weights.nbytes)
    with phase(f"Importing {size}"):
        import_weights(flags.folder, flags.to)
    unused = f" Not read, since nothing needs it: {', '.join(weights.unused)}." if weights.unused else ""
    print(f"{size} of {weights.fields.values['model_type']} are step 0 of {flags.to}, as float32.{unused}")
    return COMPLETED


def _import_adapters(flags: _Import) -> int:
    from meshpipe.exchange.importing_adapters import import_adapters
    from meshpipe.phases import phase

    with phase("Importing adapters and their base"):
        lora = import_adapters(flags.folder, flags.to, base=flags.base)
    print(f"Adapters of rank {lora.rank} and their base are step 0 of {flags.to}, as float32.")
    extra = f" --lora.dropout {lora.dropout}" * bool(lora.dropout) + " --lora.rank-stabilised" * lora.rank_stabilised
    print(
        f"Train on: --init-from {flags.to} --lora.rank {lora.rank} --lora.alpha {lora.alpha} "
        f"--lora.targets {' '.join(lora.targets)}{extra}"
    )
    return COMPLETED


def weights_export(arguments: list[str]) -> int:
    about = "Writes the weights of a checkpoint as a folder that transformers loads."
    flags = parse(_Export, arguments, "meshpipe weights export", about)
    from meshpipe.exchange.exporting import export_weights
    from meshpipe.phases import phase

    if flags.adapters:
        return _export_adapters(flags)
    with phase("Exporting"):
        dtype = export_weights(
            flags.checkpoints,
            flags.to,
            step=flags.step,
            dtype=flags.dtype,
            like=flags.like,
            base=flags.base,
            largest_file=flags.largest_file,
        )
    print(f"Weights in {dtype} are in {flags.to}.")
    return COMPLETED


def _export_adapters(flags: _Export) -> int:
    from meshpipe.exchange.exporting_adapters import export_adapters
    from meshpipe.phases import phase

    if flags.dtype not in ("auto", "float32") or flags.like is not None:
        raise ArgumentError("Adapters are exported in float32 and without a tokenizer. Leave out `dtype` and `like`.")
    with phase("Exporting adapters"):
        count = export_adapters(flags.checkpoints, flags.to, step=flags.step, base=flags.base)
    print(f"Adapters of {count} modules, in float32, are in {flags.to}.")
    return COMPLETED


COMMANDS: dict[str, Command] = {"import": weights_import, "export": weights_export}


def weights(arguments: list[str]) -> int:
    return run_one_of(COMMANDS, arguments, "meshpipe weights", USAGE)
