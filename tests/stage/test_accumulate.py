"""Communication over the data axis: none in a microbatch, one all-reduce at the end of the step."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from staged import staged

from meshpipe import PipelineConfig, make_mesh
from meshpipe.layers.task import Task
from meshpipe.models import LanguageModelConfig
from meshpipe.pipeline.executor import Executor
from meshpipe.plan.lower import lower
from meshpipe.plan.plan import Op
from meshpipe.plan.schedules import make_plan
from meshpipe.sharding import PRESETS, TENSOR_RULES, ShardingRules
from meshpipe.stage.programs import compile_stage

COLLECTIVES = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"


def language_model(mesh, rules=None):
    config = LanguageModelConfig(d_model=16, num_blocks=1, num_heads=2, d_hidden=24, vocab_size=32)
    shape = (8, 6)
    batch = {name: np.zeros(shape, np.int32) for name in ("inputs", "targets", "segment_ids")}
    batch["weights"] = np.ones(shape, np.float32)
    pipeline = PipelineConfig(num_microbatches=2)
    return staged(Task(config.layers(), config.loss, batch=batch, rules=rules), mesh, pipeline)


def collectives(program):
    """How many collectives a program has."""
    return len(re.findall(rf" ({COLLECTIVES})(-start)?\(", program.as_text()))


@pytest.mark.parametrize("tensor", [pytest.param(1, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize("rules", PRESETS.values(), ids=PRESETS)
def test_the_data_axis_communicates_once_per_step(tensor, rules):
    """The data axis adds no collective to those of the tensor axis, also where it splits parameters."""
    counts = []
    for data in (1, 2):
        (stage,) = language_model(make_mesh(1, data, tensor), rules).trace()
        programs = compile_stage(stage, set(Op))
        split = programs.split
        assert split.input is None  # the only stage is handed nothing
        counts.append([collectives(p) for p in (programs.forward, programs.backward, split.weight)])
        assert (programs.reduce is None) == (data == 1)
    assert collectives(programs.reduce)
    assert counts[0] == counts[1]
    assert any(counts[0]) == (tensor > 1)
    sizes = programs.reduce.memory_analysis()
    if not rules.gathered:
        assert sizes.alias_size_in_bytes == sizes.argument_size_in_bytes  # no second copy of the gradients
    else:
        assert collectives(programs.prepare)
        assert (
            sizes.output_size_in_bytes < 0.6 * sizes.argument_size_in_bytes
        )  # most results are split over the data axis


def test_gradients_of_parameters_that_a_step_keeps_split_are_accumulated_split():
    """Such as those of experts: each device has its own, and no other device has a partial sum of their gradients."""
    rules = ShardingRules({**TENSOR_RULES, "hidden": "data"})
    (stage,) = language_model(make_mesh(1, 2), rules).trace()
    programs = compile_stage(stage, {Op.FORWARD, Op.BACKWARD})
    accumulators, _ = programs.zeros()
    split = ["data" in param.sharding.spec for param in stage.params]
    assert True in split
    for accumulator, param, is_split in zip(accumulators, stage.params, split, strict=True):
        assert (accumulator.sharding == param.sharding) == is_split


def test_gradients_of_convolutions_are_reduced_once_per_step():
    """The gradient of a convolution is a convolution too."""

    class Convolve(nnx.Module):
        def __init__(self, rngs):
            self.convolution = nnx.Conv(2, 3, kernel_size=(3,), rngs=rngs)

        def __call__(self, x):
            return self.convolution(x)

    def loss(output, batch):
        return jnp.square(output).sum(), jnp.float32(output.size)

    batch = {"inputs": np.random.default_rng(0).standard_normal((8, 5, 2)).astype(np.float32)}
    config = PipelineConfig(num_microbatches=2)
    results = []
    for data in (1, 2):
        mesh = make_mesh(1, data)
        model = staged(Task([Convolve], loss, batch=batch), mesh, config)
        (stage,) = model.trace()
        programs = compile_stage(stage, {Op.FORWARD, Op.BACKWARD})
        if data > 1:
            assert not collectives(programs.forward)
            assert not collectives(programs.backward)
            assert collectives(programs.reduce)
        executor = Executor("test", lower(make_plan("1f1b", 1, 2), reduces=data > 1), [mesh], {0: stage}, {0: programs})
        rng = np.random.default_rng(1)
        params = tuple(
            jax.device_put(rng.standard_normal(p.shape).astype(np.float32), p.sharding) for p in stage.params
        )
        inputs = tuple(
            jax.device_put(
                batch["inputs"].reshape(s.shape) if name == "inputs" else np.zeros(s.shape, s.dtype), s.sharding
            )
            for name, s in zip(stage.input_names, stage.inputs, strict=True)
        )
        results.append(executor.run({0: params}, {0: ()}, {0: inputs})[0][0])
    for one, two in zip(*results, strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-5)
