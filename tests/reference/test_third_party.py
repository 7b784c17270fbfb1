"""Models that others wrote, cut into a pipeline, train like the uncut originals under `nnx.Optimizer`.

Each test is left out where its library is not installed: `pip install google-tunix avitai-artifex mamba2-jax`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from meshpipe import PipelineConfig, Reference, ShardingRules, Trainer, make_mesh, verify

pytestmark = pytest.mark.slow

BATCH, SEQ, VOCABULARY, STEPS, MICROBATCHES = 8, 6, 32, 6, 4
TOLERANCE = 1e-5
RATE = 3e-3
PIPELINE = PipelineConfig(schedule="1f1b", num_microbatches=MICROBATCHES)


@dataclass(frozen=True)
class Case:
    """A library's model, the same in layers, and what to train it on."""

    model: nnx.Module
    layers: list[nnx.Module]
    call: Callable[[Any, Mapping[str, Any]], Any]
    loss: Callable[[Any, Mapping[str, Any]], tuple[Any, Any]]
    batches: list[dict[str, np.ndarray]]
    tied: tuple[tuple[str, ...], ...] = ()
    found_tied: tuple[tuple[str, ...], ...] = ()
    """What is tied without being named, since the library's layers share a variable."""
    axes: tuple[str, ...] = ()
    """Logical axes that the library's parameters name; none is split."""
    by_microbatch: bool = False
    """Whether the model has batch statistics, which are those of a microbatch."""


class Step(nnx.Module):
    """A layer that holds modules of a library and calls them as the library's own model does."""

    def __init__(self, function: Callable[..., Any], *modules: nnx.Module):
        self.function, self.modules = function, nnx.List(modules)

    def __call__(self, x: Any) -> Any:
        return self.function(x, *self.modules)


def check(case: Case) -> None:
    """Judges every update by `verify`, then compares the losses of a whole run."""
    reference = Reference(case.model, call=case.call)
    rules = ShardingRules(rules={**ShardingRules().rules, **dict.fromkeys(case.axes)})
    common = {"mesh": make_mesh(2), "pipeline": PIPELINE, "tied": case.tied, "rules": rules}
    report = verify(case.layers, case.loss, optax.adamw(RATE), batches=case.batches[:2], reference=reference, **common)
    assert report.ok, report.first
    trainer = Trainer(case.layers, case.loss, optax.adamw(RATE), batch=case.batches[0], **common)
    assert trainer.model.tied == case.tied + case.found_tied
    found = [float(trainer.step(batch).loss) for batch in case.batches]
    expected = uncut_losses(case)
    print(type(case.model).__name__, "largest difference of a loss:", np.abs(np.subtract(found, expected)).max())
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)
    assert expected[-1] < expected[0] - 100 * TOLERANCE  # the last batch is the first: it has learnt something


def uncut_losses(case: Case) -> list[float]:
    optimizer = nnx.Optimizer(case.model, optax.adamw(RATE), wrt=nnx.Param)

    @nnx.jit
    def total(model, batch):
        def of(model):
            return case.loss(case.call(model, batch), batch)

        return nnx.value_and_grad(of, has_aux=True)(model)

    losses = []
    for batch in case.batches:
        parts = MICROBATCHES if case.by_microbatch else 1
        rows = {name: np.split(value, parts) for name, value in batch.items()}
        results = [total(case.model, {name: value[m] for name, value in rows.items()}) for m in range(parts)]
        weight = sum(float(weight) for (_, weight), _ in results)
        losses.append(sum(float(loss) for (loss, _), _ in results) / weight)
        gradients = jax.tree.map(lambda *leaves: sum(leaves) / weight, *(gradient for _, gradient in results))  # noqa: B023
        optimizer.update(case.model, gradients)
    return losses


def tokens(**more: np.ndarray) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    made = []
    for _ in range(STEPS - 1):
        ids = rng.integers(0, VOCABULARY, (BATCH, SEQ + 1)).astype(np.int32)
        made.append({"inputs": ids[:, :-1], "labels": ids[:, 1:], **more})
    return [*made, made[0]]


def entropy(logits: jax.Array, batch: Mapping[str, Any]) -> tuple[jax.Array, Any]:
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"])
    return losses.sum(), losses.size


def test_tied_llama3_of_tunix() -> None:
    llama3 = pytest.importorskip("tunix.models.llama3.model")
    config = llama3.ModelConfig(
        num_layers=3,
        vocab_size=VOCABULARY,
        embed_dim=16,
        hidden_dim=32,
        num_heads=2,
        head_dim=8,
        num_kv_heads=1,
        rope_theta=10_000,
        norm_eps=1e-5,
        weight_tying=True,
    )
    model = llama3.Llama3(config, rngs=nnx.Rngs(0))

    class Decoder(nnx.Module):
        def __init__(self, layer: nnx.Module):
            self.layer = layer

        def __call__(self, x: jax.Array, positions: jax.Array, attention_mask: jax.Array) -> jax.Array:
            return self.layer(x, positions, None, attention_mask)[1]

    positions = np.broadcast_to(np.arange(SEQ, dtype=np.int32), (BATCH, SEQ)).copy()
    mask = np.broadcast_to(np.tril(np.ones((SEQ, SEQ), bool)), (BATCH, SEQ, SEQ)).copy()
    check(
        Case(
            model=model,
            layers=[
                Step(lambda x, embedder: embedder.encode(x), model.embedder),
                *map(Decoder, model.layers),
                Step(lambda x, norm, embedder: embedder.decode(norm(x)), model.final_norm, model.embedder),
            ],
            call=lambda model, batch: model(batch["inputs"], batch["positions"], None, batch["attention_mask"])[0],
            loss=entropy,
            batches=tokens(positions=positions, attention_mask=mask),
            axes=("tp", "fsdp"),
            found_tied=(("layers/0/modules/0/input_embedding", "layers/4/modules/1/input_embedding"),),
        )
    )


def test_tied_mamba2() -> None:
    mamba2 = pytest.importorskip("mamba2_jax")
    config = mamba2.Mamba2Config(
        vocab_size=VOCABULARY, hidden_size=16, state_size=8, head_dim=8, chunk_size=SEQ, num_hidden_layers=2
    )
    model = mamba2.Mamba2ForCausalLM(config, rngs=nnx.Rngs(0))
    backbone = model.backbone
    check(
        Case(
            model=model,
            layers=[
                backbone.embedder,
                *(Step(lambda x, layer: layer(x)[0], layer) for layer in backbone.layers),
                Step(lambda x, norm, table: table.attend(norm(x)), backbone.final_norm, backbone.embedder),
            ],
            call=lambda model, batch: model(batch["inputs"])["logits"],
            loss=entropy,
            batches=tokens(),
            tied=(("layers/0/embedding", "layers/3/modules/1/embedding"),),
        )
    )


def images(channels: int, **more: Callable[[np.random.Generator], np.ndarray]) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    made = []
    for _ in range(STEPS - 1):
        pictures = {name: rng.normal(size=(BATCH, 8, 8, channels)).astype(np.float32) for name in ("inputs", "target")}
        made.append({**pictures, **{name: draw(rng) for name, draw in more.items()}})
    return [*made, made[0]]


def squares(output: jax.Array, batch: Mapping[str, Any]) -> tuple[jax.Array, Any]:
    losses = (output - batch["target"]) ** 2
    return losses.sum(), losses.size


def test_diffusion_transformer_of_artifex() -> None:
    dit = pytest.importorskip("artifex.generative_models.models.backbones.dit")
    model = dit.DiffusionTransformer(
        img_size=8, patch_size=4, in_channels=2, hidden_size=16, depth=3, num_heads=2, num_classes=5, rngs=nnx.Rngs(0)
    )

    class First(nnx.Module):
        def __init__(self, model: Any):
            self.patches, self.position = model.patch_embed, model.pos_embed
            self.time, self.label = model.time_embed, model.label_embed

        def __call__(self, x: jax.Array, t: jax.Array, y: jax.Array) -> dict[str, jax.Array]:
            patches = self.patches(x)
            patches = patches.reshape(len(x), -1, patches.shape[-1]) + self.position[...]
            return {"x": patches, "c": self.time(t) + self.label(y)}

    class Last(nnx.Module):
        def __init__(self, model: Any):
            self.layer = model.final_layer

        def __call__(self, value: dict[str, jax.Array]) -> jax.Array:
            x = self.layer(value["x"], value["c"]).reshape(-1, 2, 2, 4, 4, 2)
            return x.transpose(0, 1, 3, 2, 4, 5).reshape(-1, 8, 8, 2)

    class Block(nnx.Module):
        """Its `deterministic` is filled in, and handed on."""

        def __init__(self, block: nnx.Module):
            self.block = block

        def __call__(self, value: dict[str, jax.Array], *, deterministic: bool = False) -> dict[str, jax.Array]:
            return {**value, "x": self.block(value["x"], value["c"], deterministic=deterministic)}

    batches = images(
        2,
        t=lambda rng: rng.integers(0, 1000, BATCH).astype(np.float32),
        y=lambda rng: rng.integers(0, 5, BATCH).astype(np.int32),
    )
    check(
        Case(
            model=model,
            layers=[First(model), *map(Block, model.blocks), Last(model)],
            call=lambda model, batch: model(batch["inputs"], batch["t"], batch["y"]),
            loss=squares,
            batches=batches,
        )
    )


@pytest.mark.parametrize("fixed", [False, True], ids=["training", "running averages"])
def test_residual_blocks_with_batch_norm_of_artifex(fixed: bool) -> None:
    """The keyword that tells the mode is filled for a block in training, and kept where the layer fixes it."""
    resnet = pytest.importorskip("artifex.generative_models.core.layers.resnet")

    class Tower(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.blocks = nnx.List([resnet.ResNetBlock(3, 3, rngs=rngs) for _ in range(4)])

        def __call__(self, x: jax.Array, fixed: bool) -> jax.Array:
            for block in self.blocks:
                x = block(x, deterministic=fixed)
            return x

    model = Tower(nnx.Rngs(0))
    layers = [Step(lambda x, block: block(x, deterministic=fixed), b) for b in model.blocks] if fixed else model.blocks
    check(
        Case(
            model=model,
            layers=list(layers),
            call=lambda model, batch: model(batch["inputs"], fixed),
            loss=squares,
            batches=images(3),
            by_microbatch=True,
        )
    )
