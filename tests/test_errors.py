"""One check per value; its error names arguments in the library and flags on the command line."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import tiny_recipes

from meshpipe import MeshConfig, OptimizerConfig, PipelineConfig, make_mesh, use_cpu_devices
from meshpipe.checkpoint import CheckpointConfig
from meshpipe.choose.chooser import check_costs
from meshpipe.errors import ArgumentError, check_clip_norm, check_number, check_seed, check_whole, errors_name_flags
from meshpipe.models import LanguageModelConfig, TextClassifierConfig
from meshpipe.processes.config import DistributedConfig

REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "clip norm 0": (lambda: OptimizerConfig(clip_norm=0.0), "`clip_norm` must be above 0, or None to clip nothing."),
    "clip norm NaN": (lambda: OptimizerConfig(clip_norm=math.nan), "`clip_norm` must be above 0"),
    "beta1 of 1": (lambda: OptimizerConfig(beta1=1.0), "`beta1` must be a number of at least 0 and below 1. Got 1.0."),
    "beta1 of 2": (lambda: OptimizerConfig(beta1=2.0), "`beta1` must be a number of at least 0 and below 1. Got 2.0."),
    "beta2 of 1": (lambda: OptimizerConfig(beta2=1.0), "`beta2` must be a number of at least 0 and below 1."),
    "momentum of 1": (lambda: OptimizerConfig(momentum=1.0), "`momentum` must be a number of at least 0 and below 1."),
    "learning rate": (lambda: OptimizerConfig(learning_rate=math.inf), "`learning_rate` must be a number of at least"),
    "microbatches": (lambda: PipelineConfig(num_microbatches=0), "`num_microbatches` must be at least 1. Got 0."),
    "negative mesh": (lambda: MeshConfig(data=-2), "`data` must be at least 1. Got -2."),
    "huge mesh": (lambda: make_mesh(pipeline=10**8), "must not exceed the number of devices. Got 100000000"),
    "huge mesh of CPU devices": (lambda: use_cpu_devices(10**8), "at most 4096 virtual CPU devices. Got 100,000,000."),
    "no CPU device": (lambda: use_cpu_devices(0), "`count` must be at least 1. Got 0."),
    "step timeout": (lambda: DistributedConfig(step_timeout=math.nan), "`step_timeout` must be a number of at least 0"),
    "interval": (lambda: CheckpointConfig(checkpoint_every=-1), "`checkpoint_every` must be at least 0. Got -1."),
    "no folder": (
        lambda: replace(tiny_recipes.single(), checkpoint=CheckpointConfig(resume=True)),
        "`resume` needs a folder .* add `checkpoint_dir` DIR, or `run_dir` DIR.",
    ),
    "theta": (lambda: LanguageModelConfig(rope_theta=math.nan), "`rope_theta` must be a number above 1. Got nan."),
    "rate": (lambda: TextClassifierConfig(dropout_rate=1.0), "`dropout_rate` must be a number of at least 0 and below"),
}


@pytest.mark.parametrize(("call", "message"), REFUSED.values(), ids=REFUSED)
def test_the_library_refuses_what_the_flags_do(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("seed", [-1, 2**32, 2**64, True, 1.5, "3", None])
def test_a_seed_that_jax_would_cut_is_refused(seed: object) -> None:
    with pytest.raises(ArgumentError, match="`seed` must be"):
        check_seed(seed)


def test_numpy_numbers_are_accepted() -> None:
    check_seed(np.int64(2**32 - 1))
    check_clip_norm(np.float32(0.5))
    check_number("x", np.float64(0))
    check_whole("x", np.int8(1))


def test_the_command_line_names_its_flags() -> None:
    with errors_name_flags():
        assert str(ArgumentError("`batch_size` per `mesh.data`.")) == "--batch-size per --mesh.data."
        assert str(ArgumentError("`d_model` as `meshpipe plan RECIPE` says.", "model")) == (
            "--model.d-model as `meshpipe plan RECIPE` says."
        )
        with errors_name_flags(False):
            assert str(ArgumentError("`clip_norm` is wrong.")) == "`clip_norm` is wrong."
        with pytest.raises(ValueError, match=r"^--clip-norm must be above 0"):
            OptimizerConfig(clip_norm=0.0)
    assert str(ArgumentError("`clip_norm` is wrong.")) == "`clip_norm` is wrong."


def test_costs_that_processes_would_measure_are_asked_for_as_the_caller_names_them() -> None:
    config = PipelineConfig(schedule="auto")
    with pytest.raises(ArgumentError, match="pass that file as `costs` to all"):
        check_costs(config)
    with errors_name_flags(), pytest.raises(ArgumentError, match="pass that file as --costs to all"):
        check_costs(config)
