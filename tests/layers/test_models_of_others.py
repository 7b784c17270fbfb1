"""Models that others wrote, cut into layers without a change to their code, train as the uncut originals do."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from meshpipe import PipelineConfig, ShardingRules, Trainer, make_mesh

pytestmark = pytest.mark.slow

TOKENS, ROWS, LENGTH, WIDTH = 32, 8, 6, 16
LEARNING_RATE = 1e-2
TOLERANCE = 1e-5

Batch = dict[str, np.ndarray]


class Part(nnx.Module):
    """A layer that calls a method of modules that it holds."""

    def __init__(self, call: Callable[..., Any], *modules: Any):
        self.call, self.modules = call, nnx.List(modules)

    def __call__(self, value: Any, positions: Any = None, mask: Any = None, times: Any = None) -> Any:
        given = {"positions": positions, "mask": mask, "times": times}
        return self.call(*self.modules, value, **{name: field for name, field in given.items() if field is not None})


def compare(
    layers: list[Any],
    original: Any,
    run: Callable[[Any, Batch], Any],
    loss: Callable[..., Any],
    rows: list[Batch],
    **more: Any,
) -> Trainer:
    """Losses of the layers in two stages against those of the model that they were taken from."""
    trainer = Trainer(
        layers,
        loss,
        optax.adam(LEARNING_RATE),
        batch=rows[0],
        mesh=make_mesh(2),
        pipeline=PipelineConfig(num_microbatches=2),
        **more,
    )
    optimizer = nnx.Optimizer(original, optax.adam(LEARNING_RATE), wrt=nnx.Param)

    @nnx.jit
    def step(model: Any, optimizer: Any, batch: Any) -> jax.Array:
        def mean(model: Any) -> jax.Array:
            total, weight = loss(run(model, batch), batch)
            return total / weight

        value, gradients = nnx.value_and_grad(mean)(model)
        optimizer.update(model, gradients)
        return value

    for row in rows:
        assert float(trainer.step(row).loss) == pytest.approx(float(step(original, optimizer, row)), rel=TOLERANCE)
    return trainer


def token_loss(output: jax.Array, batch: Any) -> tuple[jax.Array, int]:
    losses = optax.softmax_cross_entropy_with_integer_labels(output, batch["labels"])
    return losses.sum(), losses.size


def test_llama_of_tunix_whose_embedding_is_its_head() -> None:
    llama = pytest.importorskip("tunix.models.llama3.model")
    config = llama.ModelConfig(
        num_layers=3,
        vocab_size=TOKENS,
        embed_dim=WIDTH,
        hidden_dim=2 * WIDTH,
        num_heads=2,
        head_dim=8,
        num_kv_heads=1,
        rope_theta=10_000,
        norm_eps=1e-5,
        weight_tying=True,
    )
    model = llama.Llama3(config, rngs=nnx.Rngs(0))

    def block(layer: Any, x: Any, positions: Any, mask: Any) -> Any:
        return layer(x, positions, None, mask)[1]

    layers = [
        Part(lambda embedder, tokens, **_: embedder.encode(tokens), model.embedder),
        *(Part(block, layer) for layer in model.layers),
        Part(lambda norm, embedder, x, **_: embedder.decode(norm(x)), model.final_norm, model.embedder),
    ]
    rng = np.random.default_rng(0)
    rows = [
        {
            "inputs": rng.integers(0, TOKENS, (ROWS, LENGTH)).astype(np.int32),
            "labels": rng.integers(0, TOKENS, (ROWS, LENGTH)).astype(np.int32),
            "positions": np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1)),
            "mask": np.tile(np.tril(np.ones((LENGTH, LENGTH), bool)), (ROWS, 1, 1)),
        }
        for _ in range(5)
    ]

    def run(model: Any, batch: Any) -> jax.Array:
        return model(batch["inputs"], batch["positions"], None, batch["mask"])[0]

    rules = ShardingRules(rules={"tp": "tensor", "fsdp": None})
    trainer = compare(layers, model, run, token_loss, rows, rules=rules)
    assert trainer.model.tied == (("layers/0/modules/0/input_embedding", "layers/4/modules/1/input_embedding"),)


def test_diffusion_transformer_of_artifex() -> None:
    dit = pytest.importorskip("artifex.generative_models.models.backbones.dit")
    model = dit.DiffusionTransformer(
        img_size=8, patch_size=2, in_channels=1, hidden_size=WIDTH, depth=3, num_heads=2, rngs=nnx.Rngs(0)
    )

    class Enter(nnx.Module):
        def __init__(self) -> None:
            self.patches, self.positions, self.time = model.patch_embed, model.pos_embed, model.time_embed

        def __call__(self, images: jax.Array, times: jax.Array) -> Any:
            x = self.patches(images)
            return x.reshape(x.shape[0], -1, WIDTH) + self.positions[...], self.time(times)

    class Block(nnx.Module):
        """Its `deterministic` is filled in, and handed on."""

        def __init__(self, block: Any):
            self.block = block

        def __call__(self, value: Any, *, deterministic: bool = False) -> Any:
            return self.block(*value, deterministic=deterministic), value[1]

    class Leave(nnx.Module):
        def __init__(self) -> None:
            self.final = model.final_layer

        def __call__(self, value: Any) -> Any:
            return self.final(*value)

    rng = np.random.default_rng(0)
    rows = [
        {
            "inputs": rng.normal(size=(ROWS, 8, 8, 1)).astype(np.float32),
            "times": rng.uniform(0, 100, ROWS).astype(np.float32),
            "noise": rng.normal(size=(ROWS, 16, 4)).astype(np.float32),
        }
        for _ in range(5)
    ]

    def loss(output: jax.Array, batch: Any) -> tuple[jax.Array, int]:
        errors = (output.reshape(batch["noise"].shape) - batch["noise"]) ** 2
        return errors.sum(), errors.size

    def run(model: Any, batch: Any) -> jax.Array:
        images = model(batch["inputs"], batch["times"])
        patches = images.reshape(images.shape[0], 4, 2, 4, 2)
        return patches.transpose(0, 1, 3, 2, 4).reshape(images.shape[0], 16, 4)

    compare([Enter(), *(Block(block) for block in model.blocks), Leave()], model, run, loss, rows)
