"""What notebooks and consoles show of results: one line each, and a table where it helps."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from meshpipe import PipelineConfig, StepResult, Trainer, VerifyReport, make_mesh
from meshpipe.reference.comparison import Difference

BATCH = {"inputs": np.ones((4, 2), np.float32), "weight": np.ones(4, np.float32)}


@pytest.fixture(scope="module")
def trainer() -> Trainer:
    def loss(output: Any, batch: Any) -> Any:
        return (output.mean(-1) * batch["weight"]).sum(), batch["weight"].sum()

    layers = [lambda rngs: nnx.Linear(2, 2, use_bias=False, rngs=rngs)] * 2
    config = PipelineConfig(num_microbatches=2)
    return Trainer(layers, loss, optax.sgd(0.0), batch=BATCH, mesh=make_mesh(2), pipeline=config)


def test_a_trainer_names_its_layout(trainer: Trainer) -> None:
    start = "Trainer(2 layers on pipeline 2 x data 1 x tensor 1, 1f1b, stages=2, microbatches=2, step="
    assert repr(trainer) == f"{start}{trainer.step_number})"


def test_a_notebook_shows_the_stages_of_a_trainer(trainer: Trainer) -> None:
    html = trainer._repr_html_()
    assert "<td>0</td><td>0</td><td>0 to 0</td><td>0</td><td>4</td>" in html
    assert "<td>1</td><td>1</td><td>1 to 1</td><td>1</td><td>4</td>" in html


def test_a_step_shows_its_numbers_and_what_was_left_out(trainer: Trainer) -> None:
    result = trainer.step(BATCH)
    assert repr(result) == (
        f"StepResult(step {result.step}: loss {float(result.loss):.6g}, gradient norm {float(result.grad_norm):.4g})"
    )
    assert "left out: weight 0)" in repr(trainer.step({**BATCH, "weight": np.zeros(4, np.float32)}))
    nan = jnp.float32(np.nan)
    assert repr(StepResult(3, nan, nan, jnp.bool_(False), jnp.bool_(False), {})) == (
        "StepResult(step 3: loss nan, gradient norm nan, left out: not finite)"
    )


def test_a_report_says_on_one_line_whether_it_is_good_and_has_a_table() -> None:
    good = Difference(1, "gradient", "layers/0/kernel", 1e-7, 1e-5)
    bad = Difference(1, "gradient", "layers/1/<kernel>", 0.25, 1e-5)
    assert repr(VerifyReport((good,), 1e-5)) == "VerifyReport(ok: all 1 differences are within their tolerances)"
    report = VerifyReport((good, bad), 1e-5)
    assert repr(report) == (
        "VerifyReport(failed: 1 of 2 differences are too large, first gradient layers/1/<kernel> of update 1: 0.25, "
        "allowed 1e-05)"
    )
    html = report._repr_html_()
    assert html.count("<tr>") == 3
    assert "&lt;kernel&gt;" in html
    assert html.index("differs</td><td>layers/1") < html.index("ok</td><td>layers/0")
