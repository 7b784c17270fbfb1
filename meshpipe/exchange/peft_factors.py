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


def peft_factors(model: ModelConfig, lora: LoraConfig, leaves: Mapping[str, np.ndarray]) -> PeftFactors:
    """The factors of all adapters, whose leaves are given by path."""
    by_name: dict[str, list[tuple[PeftModule, np.ndarray, np.ndarray]]] = {}
    for path, module in modules_of(model).items():
        if f"{path}/{FACTORS['lora_A']}" in leaves:
            a, b = (leaves[f"{path}/{leaf}"] for leaf in FACTORS.values())
            by_name.setdefault(module.name, []).append((module, a.reshape(-1, lora.rank).T, b.reshape(lora.rank, -1).T))
    found = PeftFactors()
    for name, parts in by_name.items():
        first, a, b = parts[0]
        if len(parts) == first.parts and all(np.array_equal(other, a) for _, other, _ in parts[1:]):
            b = np.concatenate([values for _, _, values in parts])
        else:
            a, b = np.concatenate([values for _, values, _ in parts]), _blocks(parts, lora.rank)
            times = len(parts)
            found.rank_pattern[name] = times * lora.rank
            found.alpha_pattern[name] = lora.alpha * (times**0.5 if lora.rank_stabilised else times)
        found.tensors[tensor_name(name, "lora_A")], found.tensors[tensor_name(name, "lora_B")] = a, b
    return found


def _blocks(parts: list[tuple[PeftModule, np.ndarray, np.ndarray]], rank: int) -> np.ndarray:
    """B of several parts: each has its own columns, and zeros elsewhere; parts without an adapter have zeros alone."""
    module, _, b = parts[0]
    outputs = len(b)
    made = np.zeros((module.parts * outputs, len(parts) * rank), b.dtype)
    for number, (of, _, values) in enumerate(parts):
        made[of.part * outputs : (of.part + 1) * outputs, number * rank : (number + 1) * rank] = values
    return made


def pattern(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values of single modules as the config has them, where numbers that are whole are written so."""
    return {name: int(value) if value == int(value) else value for name, value in sorted(values.items())}
