"""Verify fails where the gradient of a skip is dropped, doubled, or that of another microbatch."""

import dataclasses
from collections.abc import Callable
from typing import Any

import graph_models
import jax
import jax.numpy as jnp
import optax
import pytest
from graph_models import MODELS

import meshpipe.stage.compile_stages
from meshpipe import PipelineConfig, VerifyReport, make_mesh, verify
from meshpipe.stage.programs import compile_stage

MODEL = MODELS["skip"]
"""Stage 0 makes `early`, which the next stage and stage 3 read."""


def report() -> VerifyReport:
    return verify(
        MODEL.layers(),
        MODEL.loss,
        optax.sgd(0.1),
        batches=graph_models.batches(1),
        mesh=make_mesh(4),
        pipeline=PipelineConfig(num_microbatches=4),
    )


def dropped(gradient: jax.Array, before: list[jax.Array]) -> jax.Array:
    return jnp.zeros_like(gradient)


def doubled(gradient: jax.Array, before: list[jax.Array]) -> jax.Array:
    return 2 * gradient


def of_the_microbatch_before(gradient: jax.Array, before: list[jax.Array]) -> jax.Array:
    before.append(jnp.copy(gradient))
    return before[-2] if len(before) > 1 else gradient


def right(gradient: jax.Array, before: list[jax.Array]) -> jax.Array:
    return gradient


@pytest.mark.parametrize(
    "fault",
    [of_the_microbatch_before, *(pytest.param(fault, marks=pytest.mark.slow) for fault in (right, dropped, doubled))],
)
def test_a_wrong_gradient_of_a_skip_is_found(fault: Callable[..., jax.Array], monkeypatch: Any) -> None:
    before: list[jax.Array] = []

    def compiled(stage: Any, *arguments: Any, **options: Any) -> Any:
        programs = compile_stage(stage, *arguments, **options)
        if stage.spec.index > 0:
            return programs
        assert stage.spec.readers == (2,)

        def backward(*given: Any) -> Any:
            *others, (of_next, of_join) = given
            return programs.backward(*others, (of_next, fault(of_join, before)))

        return dataclasses.replace(programs, backward=backward)

    monkeypatch.setattr(meshpipe.stage.compile_stages, "compile_stage", compiled)
    found = report()
    assert found.ok is (fault is right), found.first
    if fault is not right:
        assert (found.first.quantity, found.first.update) == ("gradient", 1)
        wrong = {d.path for d in found.differences if d.quantity == "gradient" and not d.ok}
        assert wrong == {"layers/0/linear/kernel", "layers/0/linear/bias"}
