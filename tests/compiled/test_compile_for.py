"""What XLA says of every program of a step, on CPU devices and on a TPU that is not here."""

from dataclasses import replace

import jax
import numpy as np
import optax
import pytest
import tiny_recipes
from jax.sharding import Mesh

from meshpipe.compiled.compile_for import compile_for
from meshpipe.compiled.program import CompiledProgram
from meshpipe.compiler.topology import devices_of
from meshpipe.hardware.target_name import parse_target
from meshpipe.layers.staged_model import StagedModel
from meshpipe.mesh import make_mesh
from meshpipe.runs.build import make_chooser, make_trainer

WIDTH = tiny_recipes.DenseConfig().width
ROWS = 4
"""Examples of a microbatch."""
LAYER_BYTES = 4 * (WIDTH * WIDTH + WIDTH)


def model_on(mesh: Mesh, schedule: str = "1f1b") -> tuple[StagedModel, optax.GradientTransformation]:
    config = tiny_recipes.pipeline()
    config = replace(config, pipeline=replace(config.pipeline, schedule=schedule))
    chooser = make_chooser(config, mesh=mesh)
    return chooser.choose(), chooser.transformation


def by_name(programs: tuple[CompiledProgram, ...]) -> dict[tuple[int, str], CompiledProgram]:
    return {(program.stage, program.name): program for program in programs}


def test_programs_of_cpu_devices_have_their_operations_aliases_and_collectives() -> None:
    model, transformation = model_on(make_mesh(2, 2))
    programs = by_name(compile_for(model, transformation))
    assert {name for _, name in programs} == {"zeros", "forward", "backward", "reduce", "norm", "update", "summary"}
    product = 2 * ROWS // 2 * WIDTH * WIDTH
    assert programs[0, "forward"].flops == 2 * product
    # Of two layers, the gradients of both kernels, and of the input of the second.
    assert programs[0, "backward"].flops == 3 * product
    assert programs[0, "backward"].aliased == 2 * LAYER_BYTES
    assert not programs[0, "backward"].collectives
    (reduce,) = programs[0, "reduce"].collectives
    assert (reduce.kind, reduce.count, reduce.bytes, reduce.axes) == ("all-reduce", 1, 2 * LAYER_BYTES, ("data",))
    assert programs[0, "update"].aliased >= 6 * LAYER_BYTES - 8


def test_a_model_that_is_compiled_already_is_not_compiled_again() -> None:
    trainer = make_trainer(tiny_recipes.pipeline())
    before = dict(trainer.model.programs)
    programs = compile_for(trainer.model, optax.sgd(0.1))
    assert trainer.model.programs == before
    assert by_name(programs)[0, "forward"].temporaries == before[0].forward.memory_analysis().temp_size_in_bytes  # type: ignore[union-attr]


@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1"])
def test_programs_are_compiled_for_a_tpu_that_is_not_here(schedule: str) -> None:
    pytest.importorskip("libtpu")
    before = len(jax.live_arrays())
    model, transformation = model_on(make_mesh(2, 2, devices=devices_of(parse_target("tpu:v5e:2x2"))), schedule)
    assert model.target.name == "accelerator"
    programs = by_name(compile_for(model, transformation))
    assert len(jax.live_arrays()) <= before
    last = {"forward_backward"} if schedule == "1f1b" else {"forward", "backward_input", "backward_weight"}
    assert last <= {name for stage, name in programs if stage == 1}
    (reduce,) = programs[0, "reduce"].collectives
    assert (reduce.kind, reduce.count, reduce.axes) == ("all-reduce", 1, ("data",))
    assert all(program.arguments + program.outputs > 0 for program in programs.values())
    assert programs[0, "forward"].optimal_seconds is not None
    product = 2 * ROWS // 2 * WIDTH * WIDTH
    assert sum(programs[0, name].flops for name in ("forward", "backward") if (0, name) in programs) <= 5 * product


def test_stages_with_equal_programs_share_what_is_known_of_them() -> None:
    pytest.importorskip("libtpu")
    model, transformation = model_on(make_mesh(4, devices=devices_of(parse_target("tpu:v5e:2x2"))))
    programs = by_name(compile_for(model, transformation))
    first, second = programs[1, "backward"], programs[2, "backward"]
    assert replace(first, stage=2) == second
    meshes = [model.programs[s].backward.mesh for s in (1, 2)]  # type: ignore[union-attr]
    assert [np.size(mesh.devices) for mesh in meshes] == [1, 1]
    assert meshes[0] != meshes[1]
