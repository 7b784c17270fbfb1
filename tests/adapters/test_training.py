"""Training adapters: equal to LoRA written by hand on one device; the base does not move; a wrong scale is found."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import meshpipe
from tests.adapters.lora_model import ADAPTED, ALPHA, LAYERS, RANK, batches, loss

WIDTH, CLASSES = 8, 4


class ByHand(nnx.Module):
    """A perceptron with adapters as the paper writes them, whole."""

    def __init__(self, scale: float, rngs: nnx.Rngs):
        self.first = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.last = nnx.Linear(WIDTH, CLASSES, rngs=rngs)
        self.a1, self.b1 = nnx.LoRAParam(jnp.zeros((WIDTH, RANK))), nnx.LoRAParam(jnp.zeros((RANK, WIDTH)))
        self.a2, self.b2 = nnx.LoRAParam(jnp.zeros((WIDTH, RANK))), nnx.LoRAParam(jnp.zeros((RANK, CLASSES)))
        self.scale = scale

    def __call__(self, x: jax.Array) -> jax.Array:
        x = jnp.tanh(self.first(x) + self.scale * (x @ self.a1[...] @ self.b1[...]))
        return self.last(x) + self.scale * (x @ self.a2[...] @ self.b2[...])


PATHS = {
    "layers/0": "first",
    "layers/2": "last",
    "layers/0/lora/lora_a": "a1",
    "layers/0/lora/lora_b": "b1",
    "layers/2/lora/lora_a": "a2",
    "layers/2/lora/lora_b": "b2",
}
PERCEPTRON = [
    lambda rngs: nnx.Linear(WIDTH, WIDTH, rngs=rngs),
    jnp.tanh,
    lambda rngs: nnx.Linear(WIDTH, CLASSES, rngs=rngs),
]


def points(count: int) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(1)
    shapes = {"inputs": (8, WIDTH), "target": (8, CLASSES)}
    return [{name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()} for _ in range(count)]


def verified(scale: float, **layout: Any) -> Any:
    return meshpipe.verify(
        meshpipe.lora(PERCEPTRON, rank=RANK, alpha=ALPHA),
        loss,
        optax.adamw(1e-2, weight_decay=0.1),
        batches=points(3),
        mesh=meshpipe.make_mesh(**layout),
        pipeline=meshpipe.PipelineConfig(num_microbatches=2),
        reference=meshpipe.Reference(lambda rngs: ByHand(scale, rngs), paths=PATHS),
        clip_norm=0.5,
    )


@pytest.mark.parametrize("layout", [{"pipeline": 2}, {"data": 2}])
def test_training_equals_lora_by_hand(layout):
    report = verified(ALPHA / RANK, **layout)
    assert report.ok, report.first


def test_verify_finds_a_wrong_scale():
    report = verified(ALPHA, pipeline=2)
    assert not report.ok


@pytest.fixture(scope="module")
def trainer():
    made = meshpipe.Trainer(
        meshpipe.lora(LAYERS, rank=RANK, alpha=ALPHA, targets=ADAPTED),
        loss,
        optax.adamw(1e-2, weight_decay=0.1),
        batch=batches(1)[0],
        mesh=meshpipe.make_mesh(pipeline=2),
        pipeline=meshpipe.PipelineConfig(num_microbatches=2),
        seed=3,
    )
    made.first_values = {path: np.asarray(leaf) for path, leaf in made.params.items()}
    made.losses = [float(made.step(batch).loss) for batch in batches(1) * 30]
    return made


def test_adapters_learn_and_the_base_does_not_move(trainer):
    assert trainer.losses[-1] < 0.5 * trainer.losses[0]
    after = {path: np.asarray(leaf) for path, leaf in trainer.params.items()}
    for path, before in trainer.first_values.items():
        assert (before.tobytes() != after[path].tobytes()) == ("/lora/" in path), path


def test_only_adapters_have_optimizer_state(trainer):
    moments = {path for tree in trainer.state_tree() for path in tree["optimizer"] if "layers/" in path}
    assert moments
    assert all("/lora/" in path for path in moments)


class Head(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.tokens = nnx.Embed(16, WIDTH, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.tokens.attend(x)


@pytest.mark.slow
def test_tied_kernels_have_one_adapter():
    """Constructors whose kernels are tied by name: their adapters are tied too, so that they can be merged."""
    tied = [("layers/0/embedding", "layers/2/tokens/embedding")]
    layers = meshpipe.lora([LAYERS[0], jnp.tanh, Head], rank=RANK, targets=["layers/0", "tokens"])
    rows = [{"inputs": np.arange(8, dtype=np.int32), "target": np.eye(16, dtype=np.float32)[:8]}]
    report = meshpipe.verify(
        layers, loss, optax.sgd(0.5), batches=rows * 2, mesh=meshpipe.make_mesh(pipeline=2), tied=tied
    )
    assert report.ok, report.first
    trainer = meshpipe.Trainer(
        layers, loss, optax.sgd(0.5), batch=rows[0], mesh=meshpipe.make_mesh(pipeline=2), tied=tied
    )
    for _ in range(3):
        trainer.step(rows[0])
    for factor in ("lora_a", "lora_b"):
        first, other = (np.asarray(trainer.params[f"{at}/lora/{factor}"]) for at in ("layers/0", "layers/2/tokens"))
        assert first.any()
        np.testing.assert_array_equal(first, other)
    merged = trainer.modules(merged=True)
    assert merged[0].embedding is merged[2].tokens.embedding
    output = merged[2](jnp.tanh(merged[0](rows[0]["inputs"])))
    np.testing.assert_allclose(output, trainer.predict(rows[0]), rtol=1e-4, atol=1e-5)
