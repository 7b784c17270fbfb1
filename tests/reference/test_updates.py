"""Every update is judged by itself; what that alone could hide is found all the same."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from meshpipe import PipelineConfig, StepResult, Trainer, make_mesh, verify
from meshpipe.optimizer.tied import TiedLeaves

WIDTH = 8
RNG = np.random.default_rng(0)
BATCHES = [{name: RNG.normal(size=(16, WIDTH)).astype(np.float32) for name in ("inputs", "target")} for _ in range(3)]


class Block(nnx.Module):
    """Its bias has a gradient of mere rounding, since the batch norm takes the mean away."""

    def __init__(self, rngs: nnx.Rngs):
        self.linear = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.norm = nnx.BatchNorm(WIDTH, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + nnx.relu(self.norm(self.linear(x)))


def loss(output, batch):
    squares = (output - batch["target"]) ** 2
    return squares.sum(), squares.size


def report(optimizer=None, layers=(Block, Block), count=3, **options):
    return verify(
        list(layers),
        loss,
        optimizer or optax.adam(1e-2),
        batches=options.pop("batches", BATCHES[:count]),
        mesh=make_mesh(2),
        pipeline=PipelineConfig(schedule="gpipe", num_microbatches=2),
        **options,
    )


def wrong(found):
    return {(d.update, d.quantity) for d in found.differences if not d.ok}


def copied(trainer):
    return jax.tree.map(jnp.copy, trainer.state_tree())


def test_rounding_that_adam_makes_large_is_not_a_difference():
    found = report(count=3)
    assert found.ok, found.first
    judged = {d.path for d in found.differences if d.quantity == "parameter"}
    assert "layers/1/linear/bias" in judged


@pytest.mark.parametrize("every", [1, 2])
def test_what_is_frozen_counts_in_neither_norm(every):
    """Both sides clip by the norm of the trained parameters alone."""

    def labels(params):
        return {path: "freeze" if "linear" in path else "train" for path in params}

    frozen = optax.multi_transform({"train": optax.sgd(1e-2), "freeze": optax.set_to_zero()}, labels)
    found = report(optax.MultiSteps(frozen, every).gradient_transformation(), clip_norm=0.1)
    assert found.ok, found.first


@pytest.mark.parametrize("optimizer", [optax.adam(1e-2), optax.sgd(1e-6)], ids=["adam", "tiny steps"])
def test_a_lost_update_is_found(monkeypatch, optimizer):
    step = Trainer.step

    def lose_the_second(self, batch):
        before = copied(self)
        result = step(self, batch)
        if result.step == 2:
            trees = [{**new, "params": old["params"]} for new, old in zip(self.state_tree(), before, strict=True)]
            self.load_state_tree(trees, 2)
        return result

    monkeypatch.setattr(Trainer, "step", lose_the_second)
    found = report(optimizer, count=2)
    assert (2, "parameter") in wrong(found)
    assert not any(update == 1 for update, quantity in wrong(found) if "uninterrupted" not in quantity)


@pytest.mark.parametrize(
    ("part", "quantity"), [("params", "parameter"), ("state", "state"), ("optimizer", "optimizer state")]
)
def test_what_is_not_carried_over_is_found(monkeypatch, part, quantity):
    """The second update starts from the initial values; what `state_tree` tells before it is right."""
    step = Trainer.step
    first = {}

    def forget(self, batch):
        if self.step_number == 0:
            first[self] = copied(self)
        else:
            self.load_state_tree(
                [{**new, part: old[part]} for new, old in zip(copied(self), first[self], strict=True)], self.step_number
            )
        return step(self, batch)

    monkeypatch.setattr(Trainer, "step", forget)
    assert (2, quantity) in wrong(report(count=2))


def test_tied_parameters_that_drift_apart_are_found(monkeypatch):
    share = TiedLeaves.share_values
    calls = []

    def share_at_first(self, params):
        calls.append(self)
        return share(self, params) if len(calls) == 1 else params

    monkeypatch.setattr(TiedLeaves, "share_values", share_at_first)
    layers = [lambda rngs: nnx.Linear(WIDTH, WIDTH, rngs=rngs)] * 2
    found = report(layers=layers, count=1, tied=[("layers/0/kernel", "layers/1/kernel")])
    assert found.first.quantity == "tied parameter"
    assert found.first.path == "layers/1/kernel"


def test_work_that_is_right_only_where_it_is_looked_at_is_found(monkeypatch):
    """Reading all values after each update waits for the trainer, which a run does not do."""
    step, state_tree = Trainer.step, Trainer.state_tree
    seen = {}

    def look(self):
        seen[self] = True
        return state_tree(self)

    def drop_unseen(self, batch):
        start = jax.tree.map(jnp.copy, state_tree(self))
        result = step(self, batch)
        if not seen.pop(self, False):
            self.load_state_tree(start, result.step)
        return result

    monkeypatch.setattr(Trainer, "state_tree", look)
    monkeypatch.setattr(Trainer, "step", drop_unseen)
    found = report(count=3)
    assert wrong(found) == {(3, "uninterrupted loss"), (3, "uninterrupted gradient norm")}


def test_a_loader_may_use_its_buffer_again():
    """Batches are copied as they come, so that both sides see each of them and not the last one only."""
    buffer = {name: np.empty_like(value) for name, value in BATCHES[0].items()}

    def loader():
        for batch in BATCHES[:2]:
            for name, value in batch.items():
                buffer[name][...] = value
            yield buffer

    found, expected = report(batches=loader()), report(batches=BATCHES[:2])
    assert found.ok
    assert [d.allowed for d in found.differences] == [d.allowed for d in expected.differences]


def test_a_batch_that_is_read_late_is_found(monkeypatch):
    """As by a transfer that has not begun when `step` returns, and then sees what a loader wrote next."""
    step = Trainer.step

    class Later:
        def __init__(self, work):
            self._work = work

        def __float__(self):
            return float(self._work())

    def late(self, batch):
        made: list[StepResult] = []

        def result():
            if not made:
                made.append(step(self, batch))
            return made[0]

        self.pending = result
        later = {"loss": Later(lambda: result().loss), "grad_norm": Later(lambda: result().grad_norm), "terms": {}}
        return type("Result", (), later)

    state_tree = Trainer.state_tree

    def after_the_step(self):
        getattr(self, "pending", lambda: None)()
        return state_tree(self)

    monkeypatch.setattr(Trainer, "step", late)
    monkeypatch.setattr(Trainer, "state_tree", after_the_step)
    found = report(count=1)
    assert (1, "loss") in wrong(found)


def test_a_batch_in_which_nothing_counts_leaves_all_as_it_was(monkeypatch):
    def weighted(output, batch):
        squares = (output - batch["target"]) ** 2 * batch["weight"][:, None]
        return squares.sum(), batch["weight"].sum() * WIDTH

    batches = [
        {**batch, "weight": np.float32([1, 0][i]) * np.ones(16, np.float32)} for i, batch in enumerate(BATCHES[:2])
    ]

    def run():
        return verify(
            [Block, Block],
            weighted,
            optax.adam(1e-2),
            batches=batches,
            mesh=make_mesh(2),
            pipeline=PipelineConfig(schedule="gpipe", num_microbatches=2),
        )

    found = run()
    assert found.ok, found.first
    step = Trainer.step

    def decay(self, batch):
        result = step(self, batch)
        if result.step == 2:
            trees = [{**t, "params": {p: v * 1.0001 for p, v in t["params"].items()}} for t in copied(self)]
            self.load_state_tree(trees, 2)
        return result

    monkeypatch.setattr(Trainer, "step", decay)
    assert (2, "parameter") in wrong(run())
