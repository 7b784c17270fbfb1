"""The flags of a recipe, by name, and what a wrong one may have meant."""

import ast
import dataclasses
import difflib
import inspect
import itertools
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, get_type_hints

import tyro

PREFIXED = ("mesh", "model", "data", "lora")
"""The parts of a config whose name begins the names of their flags."""
OTHER_NAMES: Mapping[str, str] = {
    "batch": "batch-size",
    "bs": "batch-size",
    "alpha-pattern": "lora.groups",
    "checkpoint-interval": "checkpoint-every",
    "ckpt-dir": "checkpoint-dir",
    "cp-dir": "checkpoint-dir",
    "dp": "mesh.data",
    "epochs": "steps",
    "eval-interval": "eval-every",
    "fsdp": "sharding",
    "grad-clip": "clip-norm",
    "iterations": "steps",
    "logdir": "run-dir",
    "lora-alpha": "lora.alpha",
    "lora-dropout": "lora.dropout",
    "lora-r": "lora.rank",
    "lora-rank": "lora.rank",
    "lr": "learning-rate",
    "lr-schedule": "decay",
    "max-grad-norm": "clip-norm",
    "max-steps": "steps",
    "micro-batches": "num-microbatches",
    "microbatches": "num-microbatches",
    "name": "run-dir",
    "out": "run-dir",
    "out-dir": "run-dir",
    "output": "run-dir",
    "output-dir": "run-dir",
    "pp": "mesh.pipeline",
    "profile": "profile-steps",
    "rank-pattern": "lora.groups",
    "save-dir": "checkpoint-dir",
    "save-every": "checkpoint-every",
    "target-modules": "lora.targets",
    "tensorboard": "track",
    "tp": "mesh.tensor",
    "train-steps": "steps",
    "wandb": "track",
    "warmup": "warmup-steps",
    "wd": "weight-decay",
    "zero": "sharding",
}
"""Names that other trainers use, and ours."""


@dataclass(frozen=True)
class Flag:
    name: str
    """Without dashes in front: `mesh.pipeline`."""
    part: str
    """The part of the config that it belongs to; empty for a field of the config itself."""
    hint: Any
    default: Any
    text: str
    """The docstring of its field, each paragraph on one line."""


def flags_of(config: Any, part: str = "") -> list[Flag]:
    """The flags of a config and its parts, or of the dataclass of one command, in order."""
    found: list[Flag] = []
    for field, hint, text in fields_of(type(config)):
        value = getattr(config, field)
        if _is_dataclass(value):
            found += _of_part(value, field, f"{field}." if field in PREFIXED else "")
        else:
            found.append(Flag(field.replace("_", "-"), part, hint, value, text))
    return found


def _of_part(config: Any, part: str, prefix: str) -> Iterator[Flag]:
    for field, hint, text in fields_of(type(config)):
        value, name = getattr(config, field), prefix + field.replace("_", "-")
        if _is_dataclass(value):
            yield from _of_part(value, part, f"{name}.")
        else:
            yield Flag(name, part, hint, value, text)


def given_flags(arguments: Sequence[str]) -> list[tuple[str, list[str]]]:
    """The flags on a command line, in order: each one's name, as `Flag` has it, and its words, as they were written."""
    found: list[tuple[str, list[str]]] = []
    for word in arguments:
        if word.startswith("--"):
            found.append((word.partition("=")[0].lstrip("-").replace("_", "-"), [word]))
        elif found:
            found[-1][1].append(word)
    return found


def as_arguments(name: str, value: Any) -> list[str]:
    """The words that give a flag a value."""
    if isinstance(value, bool):
        section, dot, last = name.rpartition(".")
        return [f"--{name}" if value else f"--{section}{dot}no-{last}"]
    return [f"--{name}", *(map(str, value) if isinstance(value, tuple) else [str(value)])]


def suggestion(flag: str, known: Sequence[str]) -> str:
    """A sentence with the flag that was probably meant; empty if none is near."""
    name = flag.lstrip("-").partition("=")[0].replace("_", "-")
    meant = OTHER_NAMES.get(name)
    if meant not in known:
        by_last = {other.rpartition(".")[2]: other for other in reversed(known)}
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.7)
        near = near or [by_last[last] for last in difflib.get_close_matches(name.rpartition(".")[2], by_last, n=1)]
        meant = near[0] if near else None
    return "" if meant is None else f" Did you mean --{meant}?"


def _is_dataclass(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def fields_of(kind: type) -> Iterator[tuple[str, Any, str]]:
    """Name, type and text of the fields of a dataclass that have a flag."""
    hints, texts = get_type_hints(kind, include_extras=True), _texts(kind)
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        if field.init and tyro.conf.Suppress not in getattr(hint, "__metadata__", ()):
            yield field.name, hint, texts.get(field.name, "")


@cache
def _texts(kind: type) -> dict[str, str]:
    """The docstrings of the fields of a dataclass, and of those it inherits."""
    found: dict[str, str] = {}
    for cls in reversed(kind.__mro__):
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
        except (OSError, TypeError, SyntaxError):  # made at run time
            continue
        body = tree.body[0].body if isinstance(tree.body[0], ast.ClassDef) else []
        for field, text in itertools.pairwise(body):
            is_text = isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
            if is_text and isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                found[field.target.id] = _whole(str(text.value.value))  # type: ignore[attr-defined]
    return found


def _whole(text: str) -> str:
    """Each paragraph on one line."""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in inspect.cleandoc(text).split("\n\n"))
