"""`meshpipe weights`."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from meshpipe.cli.arguments import Command, parse, run_one_of
from meshpipe.errors import ArgumentError, check_whole
from meshpipe.files import expand_fields
from meshpipe.phases import phase
from meshpipe.processes.exit_codes import COMPLETED

if TYPE_CHECKING:
    from meshpipe.adapters.config import LoraConfig

USAGE = """usage: meshpipe weights import FOLDER --to CHECKPOINTS [flags]
       meshpipe weights export CHECKPOINTS --to FOLDER [--adapters] [flags]

import reads published weights (config.json and safetensors files) and writes
them as step 0 of a checkpoint folder; train --init-from FOLDER needs no import.
export writes a checkpoint as published weights, which transformers loads.
meshpipe weights export --help shows all flags."""


@dataclass(frozen=True, kw_only=True)
class _Import:
    folder: tyro.conf.Positional[Path]
    """Folder with config.json and safetensors files, or with PEFT adapters (adapter_config.json)."""
    to: Path
    """Folder for the checkpoint, made when missing. It must not contain checkpoints."""
    base: Path | None = None
    """Folder of the weights below the adapters. None takes the one that adapter_config.json names."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the parameters. float32 keeps every value, bfloat16 those of a folder in bfloat16."""

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
    """Dtype of the tensors. `auto` keeps that of the weights that the run began with, or float32, as of adapters."""
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
    about = "Writes published weights, or adapters and the weights below them, as a checkpoint."
    flags = parse(_Import, arguments, "meshpipe weights import", about)
    with phase("Importing JAX"):
        from meshpipe.exchange.importing import import_weights
        from meshpipe.report.tables import format_bytes
        from meshpipe.weights import WeightsFolder
        from meshpipe.weights.errors import listed

    weights = WeightsFolder(flags.folder, flags.base)
    size, kind = format_bytes(weights.nbytes), weights.fields.values["model_type"]
    with phase(f"Importing {size}"):
        import_weights(flags.folder, flags.to, dtype=flags.dtype, base=flags.base)
    what = f"{size} of {kind}"
    if weights.adapters is not None:
        what = f"Adapters of rank {weights.adapters.lora.rank} and their base, {what},"
    unused = f" Not read, since nothing needs it: {listed(weights.unused)}." if weights.unused else ""
    print(f"{what} are step 0 of {flags.to}, as {flags.dtype}.{unused}")
    if rounded := weights.rounded_to(flags.dtype):
        print(rounded)
    if wrong := weights.generation.notes("It is copied as it is."):
        print(wrong)
    if weights.adapters is not None:
        command = f"meshpipe train finetune:lora --init-from {flags.to} {_lora_flags(weights.adapters.lora)}"
        print(f"To train them further: {command}")
    return COMPLETED


def _lora_flags(lora: "LoraConfig") -> str:
    from meshpipe.adapters.groups import spell

    words = f"--lora.rank {lora.rank} --lora.alpha {spell(lora.alpha)} --lora.targets {shlex.join(lora.targets or ())}"
    words += f" --lora.dropout {lora.dropout}" * bool(lora.dropout) + " --lora.rank-stabilised" * lora.rank_stabilised
    if lora.groups:
        words += f" --lora.groups {shlex.join(map(str, lora.groups))}"
    return words


def weights_export(arguments: list[str]) -> int:
    about = "Writes the weights of a checkpoint as a folder that transformers loads."
    flags = parse(_Export, arguments, "meshpipe weights export", about)
    if flags.adapters:
        return _export_adapters(flags)
    with phase("Importing JAX"):
        from meshpipe.exchange.exporting import export_weights
        from meshpipe.weights import WeightsFolder
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
    if wrong := WeightsFolder(flags.to).generation.notes("It is copied as it is."):
        print(wrong)
    return COMPLETED


def _export_adapters(flags: _Export) -> int:
    if flags.like is not None:
        raise ArgumentError("Adapters are exported without a tokenizer. Leave out `like`.")
    with phase("Importing JAX"):
        from meshpipe.exchange.exporting_adapters import export_adapters
    with phase("Exporting adapters"):
        count = export_adapters(flags.checkpoints, flags.to, step=flags.step, base=flags.base, dtype=flags.dtype)
    print(f"Adapters of {count} modules, in {'float32' if flags.dtype == 'auto' else flags.dtype}, are in {flags.to}.")
    return COMPLETED


COMMANDS: dict[str, Command] = {"import": weights_import, "export": weights_export}


def weights(arguments: list[str]) -> int:
    return run_one_of(COMMANDS, arguments, "meshpipe weights", USAGE)
