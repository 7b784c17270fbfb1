"""What is chosen to be computed again: as little as the memory limit allows."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_recipes
from flax import nnx
from staged import staged

from meshpipe import PipelineConfig, make_mesh
from meshpipe.choose.memory import predict_memory
from meshpipe.choose.remat import choose_remat
from meshpipe.layers.staged_model import StagedModel
from meshpipe.layers.task import Task
from meshpipe.report.plan import layout_lines
from meshpipe.runs.build import make_chooser, make_trainer

WIDTH, ROWS, COUNT = 16, 64, 4
ADAM = optax.adam(1e-3)
BATCH = {"inputs": np.ones((ROWS * COUNT, WIDTH), np.float32)}


class Block(nnx.Module):
    """One product, of which a policy can keep the result, and much that is cheap to have again."""

    def __init__(self, rngs: nnx.Rngs):
        self.linear = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + jnp.tanh(nnx.gelu(jnp.sin(self.linear(x))))


def loss(output: Any, batch: Any) -> Any:
    return (output**2).sum(), jnp.float32(output.size)


def model(remat: str, limit: int | None = None, **pipeline: Any) -> StagedModel:
    pipeline = {"schedule": "gpipe", "num_microbatches": COUNT} | pipeline
    config = PipelineConfig(remat=remat, memory_limit=None if limit is None else str(limit), **pipeline)
    return staged(Task([Block] * 4, loss, batch=BATCH), make_mesh(2), config)


def peaks(remat: str, **pipeline: Any) -> list[int]:
    return [rank.total for rank in predict_memory(model(remat, **pipeline), ADAM)]


def choose(limit: int, **pipeline: Any) -> tuple[str, ...]:
    return choose_remat(model("auto", limit, **pipeline), ADAM, limit)


def test_more_is_computed_again_as_the_limit_falls() -> None:
    plain, dots, least = max(peaks("none")), max(peaks("dots_saveable")), max(peaks("nothing_saveable"))
    assert plain > dots > least
    assert choose(plain) == ("none", "none")
    assert "dots_saveable" in choose(plain - 1)
    assert choose(dots) == ("dots_saveable", "dots_saveable")
    assert "nothing_saveable" in choose(least)
    message = rf"needs {least:,} bytes on each device .* Got a limit of {least - 1:,} bytes\."
    with pytest.raises(ValueError, match=message):
        choose(least - 1)


def test_ranks_choose_by_themselves() -> None:
    """Of 1f1b, the first rank holds two microbatches and the last one."""
    first, last = peaks("none", schedule="1f1b")
    assert first > last
    limit = max(peaks("full", schedule="1f1b"))
    assert last <= limit < first
    names = choose(limit, schedule="1f1b")
    assert names[0] != "none"
    assert names[1] == "none"


@pytest.mark.parametrize("share", [0.1, 0.4, 0.7])
def test_no_stage_of_several_computes_again_for_nothing(share: float) -> None:
    several: dict[str, Any] = {"schedule": "interleaved-1f1b", "stages_per_rank": 2}
    low, high = max(peaks("full", **several)), max(peaks("none", **several))
    limit = int(low + share * (high - low))
    names = choose(limit, **several)
    assert max(peaks(",".join(names), **several)) <= limit
    changed = [stage for stage, name in enumerate(names) if name != "none"]
    assert 0 < len(changed) < len(names)
    for stage in changed:
        fewer = [*names[:stage], "none", *names[stage + 1 :]]
        assert max(peaks(",".join(fewer), **several)) > limit


def test_a_trainer_takes_what_was_chosen_says_so_and_computes_the_same() -> None:
    points = [tiny_recipes.Points(16, 8)[i] for i in range(16)]
    batch = {name: np.stack([point[name] for point in points]) for name in ("inputs", "labels")}
    config = replace(tiny_recipes.pipeline(), model=tiny_recipes.DenseConfig(depth=2))
    peaks = [rank.total for rank in predict_memory(make_chooser(config).choose(), config.optimizer.build(1))]
    assert peaks[0] > peaks[1]
    limit = PipelineConfig(num_microbatches=4, remat="auto", memory_limit=str(peaks[0] - 1))
    plain, chosen = (make_trainer(c) for c in (config, replace(config, pipeline=limit)))
    assert chosen.model.remat is not None
    assert chosen.model.remat[0] != "none"
    assert chosen.model.remat[1] == "none"
    assert f"remat auto ({chosen.model.remat[0]} none)" in layout_lines("mine", chosen.model)[2]
    gradients = [jax.device_get(trainer.loss_and_gradients(batch)) for trainer in (plain, chosen)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), *gradients)
