"""The factors of adapters as PEFT has them, made of the leaves of adapters here.

Of a module of transformers with several parts, such as GPT-2's queries, keys and values, the parts have adapters of
their own here. PEFT has one for all: where the parts have one A, it is theirs and B is theirs side by side; otherwise
both are of a rank so many times as high, with those of the parts as blocks, which computes exactly the same.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from meshpipe.adapters.config import LoraConfig
from meshpipe.models.model import ModelConfig
from meshpipe.weights.peft import FACTORS, PeftModule, modules_of, tensor_name


@dataclass
class PeftFactors:
    """What a file of adapters holds, and what its config says of single modules."""

    tensors: dict[str, np.ndarray] = field(default_factory=dict)
    """By name: A is [rank, inputs], B is [outputs, rank]."""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class _Part:
    """The adapter of a module here, which is all or a part of one of transformers."""

    module: PeftModule
    a: np.ndarray
    """[rank, inputs]"""
    b: np.ndarray
    """[outputs, rank]"""
    scale: float

    @property
    def rank(self) -> int:
        return len(self.a)


def peft_factors(model: ModelConfig, lora: LoraConfig, leaves: Mapping[str, np.ndarray]) -> PeftFactors:
    """The factors of all adapters, whose leaves are given by path."""
    by_name: dict[str, list[_Part]] = {}
    for path, module in modules_of(model).items():
        if f"{path}/{FACTORS['lora_A']}" in leaves:
            a, b = (leaves[f"{path}/{leaf}"] for leaf in FACTORS.values())
            rank, scale = lora.size_of(path)
            part = _Part(module, a.reshape(-1, rank).T, b.reshape(rank, -1).T, scale)
            by_name.setdefault(module.name, []).append(part)
    found = PeftFactors()
    for name, parts in by_name.items():
        first = parts[0]
        if len(parts) == first.module.parts and all(_have_one_a(first, other) for other in parts[1:]):
            a, b = first.a, np.concatenate([part.b for part in parts])
        else:
            a, b = np.concatenate([part.a for part in parts]), _blocks(parts)
        found.tensors[tensor_name(name, "lora_A")], found.tensors[tensor_name(name, "lora_B")] = a, b
        rank = len(a)
        alpha = first.scale * (rank**0.5 if lora.rank_stabilised else rank)
        if rank != lora.rank:
            found.rank_pattern[name] = rank
        if abs(alpha - lora.alpha) > 1e-9 * alpha:
            found.alpha_pattern[name] = alpha
    return found


def _have_one_a(part: _Part, other: _Part) -> bool:
    return part.scale == other.scale and np.array_equal(part.a, other.a)


def _blocks(parts: list[_Part]) -> np.ndarray:
    """B of several parts, with the scale of the first: each has its own columns, and zeros elsewhere; parts without an
    adapter have zeros alone.
    """
    first, outputs = parts[0], len(parts[0].b)
    made = np.zeros((first.module.parts * outputs, sum(part.rank for part in parts)), first.b.dtype)
    column = 0
    for part in parts:
        row, scale = part.module.part * outputs, part.scale / first.scale
        made[row : row + outputs, column : column + part.rank] = part.b * scale if scale != 1 else part.b
        column += part.rank
    return made


def pattern(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values of single modules as the config has them: numbers that are whole but for rounding are written so."""
    return {name: round(v) if abs(v - round(v)) < 1e-9 * v else v for name, v in sorted(values.items())}
