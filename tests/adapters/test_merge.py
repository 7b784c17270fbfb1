"""Merged adapters: the base computes what the adapted model did, within the rounding of one kernel."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import meshpipe
from meshpipe.adapters.adapted import delta
from meshpipe.layers.modules import host_device
from tests.adapters.lora_model import ADAPTED, ALPHA, LAYERS, RANK, Block, batches, chain, loss, ready, with_values


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_merged_equals_adapted_within_the_rounding_of_a_kernel(dtype):
    """Both sums have n products, of two terms or three: each float32 result errs by at most n * eps of the sum of
    absolute values. The merged kernel is rounded once to its dtype, and the adapted output twice.
    """
    linear = nnx.Linear(64, 32, param_dtype=dtype, dtype=jnp.float32, rngs=nnx.Rngs(0))
    (adapted,) = with_values(meshpipe.lora([linear], rank=4, alpha=8.0))
    (merged,) = meshpipe.merge_lora([adapted])
    x = jax.random.normal(jax.random.key(1), (16, 64))
    absolute = np.abs(x) @ np.abs(np.asarray(linear.kernel[...], np.float32)) + 2 * np.abs(x) @ (
        np.abs(adapted.lora.lora_a[...]) @ np.abs(adapted.lora.lora_b[...])
    )
    bound = (2 * 64 * np.finfo(np.float32).eps + float(jnp.finfo(dtype).eps) / 2) * absolute + 1e-6
    difference = np.abs(merged(x) - adapted(x))
    assert (difference <= bound).all()
    assert difference.max() < np.abs(adapted(x) - linear(x)).max() / 10
    assert merged.kernel.dtype == dtype


def test_a_merged_model_is_that_of_the_base_and_others_stay_as_they_are():
    adapted = with_values(meshpipe.lora([ready(make) for make in (LAYERS[0], Block)], rank=RANK, targets=("*",)))
    merged = meshpipe.merge_lora(adapted)
    x = jnp.arange(16)
    np.testing.assert_allclose(chain(merged, x), chain(adapted, x), rtol=1e-4, atol=1e-5)
    assert type(merged[1].out) is nnx.LinearGeneral
    assert not nnx.to_flat_state(nnx.state(nnx.List(merged), nnx.LoRAParam))
    assert merged[1].norm.scale is adapted[1].norm.scale
    assert hasattr(adapted[1].out, "lora")


def test_modules_that_share_a_kernel_are_merged_once():
    table = nnx.Embed(16, 8, rngs=nnx.Rngs(0))
    adapted = with_values(meshpipe.lora([table, table], rank=2, targets=["layers/0"]))
    merged = meshpipe.merge_lora(adapted)
    assert merged[0].embedding is merged[1].embedding
    np.testing.assert_allclose(merged[0].embedding[...], table.embedding[...] + delta(adapted[0]), rtol=1e-6)


def test_a_kernel_with_an_adapter_in_one_of_its_modules_cannot_be_merged():
    one, other = (nnx.Linear(4, 4, rngs=nnx.Rngs(0)) for _ in range(2))
    other.kernel = one.kernel
    (adapted,) = meshpipe.lora([one], rank=2)
    with pytest.raises(ValueError, match="Modules that hold one kernel must have one adapter"):
        meshpipe.merge_lora([adapted, other])


def test_a_lora_linear_of_flax_is_merged_and_one_derived_from_it_refused():
    class Derived(nnx.LoRALinear):
        pass

    kinds = (nnx.LoRALinear, Derived)
    given, derived = with_values([kind(8, 4, lora_rank=2, rngs=nnx.Rngs(0)) for kind in kinds])
    (merged,) = meshpipe.merge_lora([given])
    x = jax.random.normal(jax.random.key(1), (3, 8))
    assert type(merged) is nnx.Linear
    assert not hasattr(merged, "lora")
    np.testing.assert_allclose(merged(x), given(x), rtol=1e-5, atol=1e-6)
    assert np.abs(merged(x) - x @ given.kernel[...]).max() > 0.01
    with pytest.raises(ValueError, match=r"Got 0, a Derived, which is derived from it. Keep it unmerged"):
        meshpipe.merge_lora([derived])


@pytest.fixture(scope="module")
def trained():
    layers = meshpipe.lora([ready(make) for make in LAYERS], rank=RANK, alpha=ALPHA, targets=ADAPTED)
    meshpipe.use_cpu_devices(4)
    trainer = meshpipe.Trainer(
        layers,
        loss,
        optax.adam(1e-2),
        batch=batches(1)[0],
        mesh=meshpipe.make_mesh(pipeline=2),
        pipeline=meshpipe.PipelineConfig(num_microbatches=2),
    )
    for batch in batches(3):
        trainer.step(batch)
    return trainer, layers


def test_a_trainer_gives_modules_merged_and_unmerged(trained):
    trainer, _ = trained
    batch = batches(1)[0]
    expected = trainer.predict({"inputs": batch["inputs"]})
    with jax.default_device(host_device()):
        for merged in (False, True):
            modules = trainer.modules(merged=merged)
            np.testing.assert_allclose(chain(modules, batch["inputs"]), expected, rtol=1e-4, atol=1e-5)
            assert hasattr(modules[0], "lora") != merged


def test_a_trainer_writes_adapters_or_merged_kernels(trained):
    trainer, layers = trained
    base = [ready(make) for make in LAYERS]
    x = batches(1)[0]["inputs"]
    with pytest.raises(ValueError, match=r"Only the trained layer has layers/0/lora/lora_a. Pass `merged=True`"):
        trainer.update(base)
    with pytest.raises(ValueError, match=r"has layers/0/lora/lora_a. Pass modules without it."):
        trainer.update(layers, merged=True)
    trainer.update(base, merged=True)
    trainer.update(layers)
    np.testing.assert_allclose(chain(base, x), trainer.predict({"inputs": x}), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(chain(layers, x), trainer.predict({"inputs": x}), rtol=1e-4, atol=1e-5)
