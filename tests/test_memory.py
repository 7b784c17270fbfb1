"""The predicted memory of a rank is what its arrays take."""

from dataclasses import replace

import jax
import tiny_recipes

from meshpipe.config import Config
from meshpipe.memory import RankMemory, predict_memory
from meshpipe.mesh import MeshConfig
from meshpipe.pipeline.config import PipelineConfig
from meshpipe.staged_model import StagedModel
from meshpipe.trainer import Trainer


def predict(config: Config) -> list[RankMemory]:
    return predict_memory(StagedModel.from_config(config), config.optimizer.build(config.steps))


def on_device(leaves: object, device: jax.Device) -> int:
    """Bytes of arrays that one device holds."""
    shards = (shard for leaf in jax.tree.leaves(leaves) for shard in leaf.addressable_shards)
    return sum(shard.data.nbytes for shard in shards if shard.device == device)


def test_parameters_and_optimizer_are_exact() -> None:
    config = tiny_recipes.pipeline()
    trainer = Trainer.from_config(config)
    trees = trainer.state_tree()
    for memory in predict(config):
        device = trainer.mesh.devices[memory.rank].flat[0]
        assert memory.parameters == on_device([tree["params"] for tree in trees], device)
        assert memory.optimizer == on_device([tree["optimizer"] for tree in trees], device)
        assert memory.gradients == memory.parameters  # float32, as the parameters are


def test_activations_of_dense_layers() -> None:
    # Of each layer, backward needs y = tanh(...) and 1 - y: 4 examples of 8 float32 in each, 128 bytes. What the first
    # layer reads is in the batch already. At the peak another output of as many bytes is on its way, or its gradient.
    first, last = predict(tiny_recipes.pipeline())
    assert (first.live_activations, last.live_activations) == (2, 1)
    assert first.activations == 2 * (2 * 2 * 128) + 128
    # The input that came from the other rank, and at least the probabilities that the loss's gradient is made of.
    assert last.activations >= 128 + 2 * 2 * 128 + 128


def test_data_splits_activations_and_remat_saves_them() -> None:
    config = replace(tiny_recipes.single(), model=tiny_recipes.DenseConfig(depth=12))
    (plain,) = predict(config)
    (split,) = predict(replace(config, mesh=MeshConfig(data=2)))
    scalar = 4  # the number of examples, which both devices keep
    assert split.activations == (plain.activations - scalar) // 2 + scalar
    assert split.batch == plain.batch // 2
    assert split.parameters == plain.parameters
    four = replace(config, pipeline=PipelineConfig(num_microbatches=4, schedule="gpipe"))
    (kept,) = predict(four)
    (recomputed,) = predict(replace(four, pipeline=replace(four.pipeline, remat="full")))
    assert kept.live_activations == recomputed.live_activations == 4
    assert recomputed.activations < kept.activations / 2


def test_the_sum_is_the_sum() -> None:
    (memory,) = predict(tiny_recipes.single())
    parts = (memory.parameters, memory.gradients, memory.optimizer, memory.batch, memory.activations)
    assert memory.total == sum(parts)
