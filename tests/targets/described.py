"""Models on devices that are not here, compiled for them, and what XLA made of every program."""

import importlib.util
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import jax
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh
from staged import staged

from meshpipe import PipelineConfig
from meshpipe.compiled.collectives import Collective, collectives_of
from meshpipe.compiled.hlo import Module
from meshpipe.compiler.compiler import Compiler
from meshpipe.compiler.topology import devices_of
from meshpipe.hardware.target_name import parse_target
from meshpipe.layers.staged_model import StagedModel
from meshpipe.layers.task import Task
from meshpipe.models import LanguageModelConfig
from meshpipe.optimizer.updates import UpdatePrograms
from meshpipe.sharding import FULLY_SHARDED, ShardingRules

TARGETS = {"tpu": "tpu:v5e:2x4", "gpu": "gpu:h100:8"}
WHEELS = {"tpu": ("libtpu",), "gpu": ("jax_cuda12_plugin", "jax_cuda13_plugin")}
COLLECTIVES = re.compile(r" (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(")
CUSTOM_CALL = re.compile(r'custom_call_target="([^"]*)"')

NEEDS = {
    name: pytest.mark.skipif(
        not any(importlib.util.find_spec(wheel) for wheel in wheels), reason=f"needs {' or '.join(wheels)}"
    )
    for name, wheels in WHEELS.items()
}
platforms = pytest.mark.parametrize("platform", [pytest.param(name, marks=mark) for name, mark in NEEDS.items()])


@dataclass(frozen=True, kw_only=True)
class Layout:
    pipeline: int = 2
    data: int = 1
    tensor: int = 1
    config: Mapping[str, Any] = field(default_factory=dict)
    rules: ShardingRules = field(default_factory=ShardingRules)
    dtype: str = "bfloat16"


LAYOUTS = {
    "1f1b": Layout(),
    "float32": Layout(dtype="float32"),
    "zb-h1": Layout(config={"schedule": "zb-h1"}),
    "zb-v": Layout(config={"schedule": "zb-v", "stages_per_rank": 2}),
    "tensor": Layout(tensor=2),
    "data": Layout(data=2),
    "data, zb-h1": Layout(data=2, config={"schedule": "zb-h1"}),
    "fully sharded": Layout(data=2, rules=FULLY_SHARDED),
    "remat": Layout(config={"remat": "full"}),
    "all, zb-v": Layout(
        data=2, tensor=2, rules=FULLY_SHARDED, config={"schedule": "zb-v", "stages_per_rank": 2, "remat": "full"}
    ),
}


@dataclass(frozen=True)
class Said:
    """What XLA says of a program."""

    collectives: Mapping[str, int]
    read: tuple[Collective, ...]
    """The same, as meshpipe reads them for its predictions."""
    custom_calls: frozenset[str]
    aliased: int
    """Bytes of outputs that take the place of donated arguments, on a device."""
    temporaries: int
    transposes: int

    @classmethod
    def of(cls, program: Any, mesh: Mesh) -> "Said":
        text = program.text if hasattr(program, "text") else program.as_text()
        if hasattr(program, "memory"):
            aliased, temporaries = program.memory.aliased, program.memory.temporaries
        else:
            memory = program.memory_analysis()
            aliased, temporaries = memory.alias_size_in_bytes, memory.temp_size_in_bytes
        found, read = dict(Counter(COLLECTIVES.findall(text))), collectives_of(Module(text), dict(mesh.shape))
        transposes = text.count(" transpose(")
        return cls(found, read, frozenset(CUSTOM_CALL.findall(text)), aliased, temporaries, transposes)


@cache
def compiler(platform: str) -> Compiler:
    """One for all layouts: equal programs are compiled once."""
    return Compiler()


def mesh_of(platform: str, layout: Layout) -> Mesh:
    shape = layout.pipeline, layout.data, layout.tensor
    devices = devices_of(parse_target(TARGETS[platform]))[: int(np.prod(shape))]
    return Mesh(np.array(devices).reshape(shape), ("pipeline", "data", "tensor"), axis_types=(AxisType.Auto,) * 3)


def language_model(platform: str, layout: Layout, **sizes: Any) -> StagedModel:
    seq = 128
    small = {"d_model": 128, "num_blocks": 2, "num_heads": 4, "num_kv_heads": 2, "d_hidden": 256, "vocab_size": 512}
    config = LanguageModelConfig(**{**small, "dtype": layout.dtype, **sizes})
    batch: dict[str, Any] = {name: np.zeros((8, seq), np.int32) for name in ("inputs", "targets", "segment_ids")}
    batch["weights"] = np.ones((8, seq), np.float32)
    task = Task(config.layers(), config.loss, batch=batch, notes=config.notes, rules=layout.rules)
    return model_of(task, platform, layout)


def model_of(task: Task, platform: str, layout: Layout) -> StagedModel:
    pipeline = PipelineConfig(**{"num_microbatches": 4, "schedule": "1f1b", **layout.config})
    return staged(task, mesh_of(platform, layout), pipeline)


def compiled(model: StagedModel, platform: str) -> dict[tuple[int, str], Said]:
    """By stage and name, what XLA made of the programs of a step. Nothing is allocated."""
    model.trace_to_run()
    programs = model.compile_programs(compiler(platform))
    updates = UpdatePrograms(optax.adamw(1e-3), model.parameters, 1.0)
    updates.compile(compiler(platform))

    def named() -> Iterator[tuple[int, str, Any]]:
        for stage, of_stage in programs.items():
            for part, prefix in ((of_stage, ""), (of_stage.split, "backward_")):
                yield from ((stage, prefix + name, value) for name, value in (vars(part) if part else {}).items())
            yield stage, "norm", updates.norms[stage]
            yield stage, "update", updates.updates[stage]

    return {
        (stage, name): Said.of(program, model.stages[stage].submesh)
        for stage, name, program in named()
        if hasattr(program, "as_text") or hasattr(program, "text")
    }


def bytes_on_a_device(shapes: Any) -> int:
    return sum(
        int(np.prod(s.sharding.shard_shape(s.shape))) * s.dtype.itemsize
        for s in jax.tree.leaves(shapes)
        if hasattr(s, "sharding")
    )
