"""Running a program: what it computes, which stages it resolves, and how many slots it takes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meshpipe.mesh import make_mesh, submeshes
from meshpipe.pipeline.executor import Executor
from meshpipe.plan.lower import Compute, Instruction, Reduce, Transfer, lower
from meshpipe.plan.plan import Op
from meshpipe.plan.schedules import SCHEDULES, make_plan
from meshpipe.sharding import abstract, batch_sharding, replicated
from meshpipe.stage.programs import StagePrograms, compile_stage
from meshpipe.stage.spec import Boundary, StageOutput, StageSpec
from meshpipe.stage.target import CPU
from meshpipe.stage.traced import TracedStage

ROWS, WIDTH, STAGES = 2, 4, 3
MESHES = submeshes(make_mesh(STAGES, 2))


def scale(params: Any, state: Any, values: Any, batch: Any, randomness: Any) -> StageOutput:
    """Counts its microbatches; the last stage adds up the outputs, weighted."""
    value = values[0] if values else batch["inputs"]
    return StageOutput((jnp.sin(value) * params["scale"],), {}, None, {"seen": state["seen"] + 1})


def last(params: Any, state: Any, values: Any, batch: Any, randomness: Any) -> StageOutput:
    (value,), _, _, after = scale(params, state, values, batch, randomness)
    loss = (value * batch["weight"][:, None]).sum()
    return StageOutput((), {"loss": loss, "weight": batch["weight"].sum()}, loss, after)


def traced_stages(num_microbatches: int) -> dict[int, TracedStage]:
    fields = {
        "inputs": jax.ShapeDtypeStruct((num_microbatches, ROWS, WIDTH), jnp.float32),
        "weight": jax.ShapeDtypeStruct((num_microbatches, ROWS), jnp.float32),
    }
    stages: dict[int, TracedStage] = {}
    boundaries: tuple[Boundary, ...] = ()
    for index, mesh in enumerate(MESHES):
        spec = StageSpec(
            index=index,
            mesh=mesh,
            target=CPU,
            function=last if index == STAGES - 1 else scale,
            params={"scale": abstract((WIDTH,), jnp.float32, replicated(mesh))},
            state={"seen": abstract((), jnp.int32, replicated(mesh))},
            gradients_in=(True,) * len(boundaries),
            readers=(1,) if index < STAGES - 1 else (),
        )
        stages[index] = TracedStage(spec, boundaries, fields)
        boundaries = stages[index].boundaries_out
    return stages


def nothing(*_: Any) -> Any:
    raise AssertionError("not to be run")


UNCOMPILED = StagePrograms(None, tuple, nothing, None, nothing)


@pytest.fixture(scope="module")
def traced() -> dict[int, TracedStage]:
    return traced_stages(num_microbatches=4)


@pytest.fixture(scope="module")
def programs(traced: dict[int, TracedStage]) -> dict[int, StagePrograms]:
    """Every program that any schedule asks for."""
    return {s: compile_stage(stage, set(Op)) for s, stage in traced.items()}


def test_a_program_without_reductions_is_refused(
    traced: dict[int, TracedStage], programs: dict[int, StagePrograms]
) -> None:
    with pytest.raises(ValueError, match="reduces=True"):
        Executor("test", lower(make_plan("1f1b", STAGES, 4)), MESHES, traced, programs)


def unrun(schedule: str, num_microbatches: int, traced: dict[int, TracedStage]) -> Executor:
    program = lower(make_plan(schedule, STAGES, num_microbatches))
    return Executor("test", program, MESHES, traced, dict.fromkeys(traced, UNCOMPILED))


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "zb-h1", "1f1b with one program for both"])
def test_a_step_sums_gradients_and_losses_and_advances_state(
    schedule: str, traced: dict[int, TracedStage], programs: dict[int, StagePrograms]
) -> None:
    num_microbatches = 4
    if schedule not in SCHEDULES:
        fused = compile_stage(traced[STAGES - 1], {Op.FORWARD, Op.BACKWARD}, fused=True)
        assert fused.forward is fused.backward is None
        schedule, programs = "1f1b", programs | {STAGES - 1: fused}
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(num_microbatches, ROWS, WIDTH)).astype(np.float32)
    weight = rng.uniform(size=(num_microbatches, ROWS)).astype(np.float32)
    scales = [rng.normal(size=WIDTH).astype(np.float32) for _ in range(STAGES)]

    program = lower(make_plan(schedule, STAGES, num_microbatches), reduces=True)
    executor = Executor("test", program, MESHES, traced, programs)
    fields = {"inputs": inputs, "weight": weight}
    place = {s: replicated(stage.spec.mesh) for s, stage in traced.items()}
    arguments = (
        {s: (jax.device_put(scales[s], place[s]),) for s in traced},
        {s: (jax.device_put(np.int32(0), place[s]),) for s in traced},
        {
            s: tuple(
                jax.device_put(fields[name], batch_sharding(stage.spec.mesh, stage.microbatch_size))
                for name in stage.input_names
            )
            for s, stage in traced.items()
        },
    )
    results = [executor.run(*arguments) for _ in range(2)]

    def whole(scales: list[np.ndarray]) -> jax.Array:
        value = inputs
        for factor in scales:
            value = jnp.sin(value) * factor
        return (value * weight[..., None]).sum()

    total, expected = jax.value_and_grad(whole)(scales)
    for gradients, state, sums in results:
        assert list(sums) == [STAGES - 1]
        np.testing.assert_allclose(sums[STAGES - 1]["loss"], total, rtol=1e-5)
        np.testing.assert_allclose(sums[STAGES - 1]["weight"], weight.sum(), rtol=1e-6)
        for s in traced:
            np.testing.assert_allclose(gradients[s][0], expected[s], rtol=1e-4, atol=1e-6)
            assert gradients[s][0].sharding == place[s]
            assert int(state[s][0]) == num_microbatches


def test_slots_are_used_again(traced: dict[int, TracedStage]) -> None:
    """1f1b takes no more of them for more microbatches; gpipe keeps every microbatch's residuals."""
    few, many = (len(unrun("1f1b", count, traced)._empty) for count in (4, 10))
    assert few == many
    few, many = (len(unrun("gpipe", count, traced)._empty) for count in (4, 10))
    assert many - few >= STAGES * (10 - 4)


def test_a_step_is_a_flat_list_with_an_entry_per_instruction(traced: dict[int, TracedStage]) -> None:
    executor = unrun("1f1b", 4, traced)
    assert len(executor._steps) == len(lower(make_plan("1f1b", STAGES, 4)).instructions)


@pytest.mark.parametrize("local", [{0}, {1}, {0, 2}])
def test_only_the_work_of_local_stages_is_resolved(local: set[int], traced: dict[int, TracedStage]) -> None:
    """The host work of a step does not grow with stages that live elsewhere."""
    program = lower(make_plan("1f1b", STAGES, 4))
    here = {s: stage for s, stage in traced.items() if s in local}
    executor = Executor("test", program, MESHES, here, dict.fromkeys(local, UNCOMPILED))
    concerned = [i for i in program.instructions if stages_of(i) & local]
    assert len(executor._steps) == len(concerned) < len(program.instructions)


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "zb-h1"])
def test_a_step_of_one_rank_is_as_long_among_64_as_among_4(
    schedule: str, traced: dict[int, TracedStage], programs: dict[int, StagePrograms]
) -> None:
    """Calls of compiled programs, transfers and frees are all that a step dispatches."""
    found = []
    for num_ranks in (4, 64):
        program = lower(make_plan(schedule, num_ranks, 4), reduces=True)
        meshes = [MESHES[rank % STAGES] for rank in range(num_ranks)]
        executor = Executor("test", program, meshes, {1: traced[1]}, {1: programs[1]})
        transfers = [i for i in program.instructions if isinstance(i, Transfer) and 1 in stages_of(i)]
        found.append((len(executor._steps), len(transfers), len(executor._moves), len(executor._named)))
    few, many = found
    assert few == many
    assert few[1:3] == (4 * 4, 4)  # four transfers of each microbatch, each by something made once


def stages_of(instruction: Instruction) -> set[int]:
    if isinstance(instruction, Compute):
        return {instruction.action.stage}
    if isinstance(instruction, Transfer):
        return {instruction.source.stage, instruction.target.stage}
    if isinstance(instruction, Reduce):
        return {instruction.stage}
    return {buffer.stage for buffer in instruction.buffers}
