"""`meshpipe.lora` grafts adapters: the base keeps its paths, first values and outputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import meshpipe
from meshpipe.adapters.adapted import delta, einsum_of_factors
from meshpipe.layers.examine import abstract_layers
from meshpipe.layers.initialise import initialise
from meshpipe.sharding import ShardingRules
from meshpipe.stage.target import CPU
from tests.adapters.lora_model import ADAPTED, ALPHA, LAYERS, RANK, Block, chain, ready, with_values

FACTORS = ("lora/lora_a", "lora/lora_b")


def first_values(layers, seed=3):
    mesh = meshpipe.submeshes(meshpipe.make_mesh(pipeline=1))[0]
    made = initialise([(layer, mesh) for layer in abstract_layers(layers, ["inputs"])], ShardingRules(), seed, CPU)
    return {path: np.asarray(leaf) for params, _ in made for path, leaf in params.items()}


@pytest.fixture(scope="module")
def adapted_values():
    return first_values(meshpipe.lora(LAYERS, rank=RANK, alpha=ALPHA, targets=ADAPTED))


def test_the_base_keeps_its_paths_and_first_values(adapted_values):
    base = first_values(LAYERS)
    assert {path for path in adapted_values if not path.endswith(FACTORS)} == base.keys()
    for path, value in base.items():
        np.testing.assert_array_equal(adapted_values[path], value)


def test_b_begins_at_zero_and_a_is_drawn_for_every_path(adapted_values):
    firsts = {path: value for path, value in adapted_values.items() if path.endswith("lora_a")}
    assert len(firsts) == 11
    assert len({value.tobytes() for value in firsts.values()}) == len(firsts)
    assert not any(value.any() for path, value in adapted_values.items() if path.endswith("lora_b"))


def test_shapes_and_axes_of_factors_are_those_of_the_kernel():
    layer = abstract_layers(meshpipe.lora([Block], rank=RANK), ["inputs"])[0]
    shapes = {path.removeprefix("layers/0/"): leaf.shape for path, leaf in layer.params.items()}
    assert shapes["parts/0/lora/lora_a"] == (8, RANK)
    assert shapes["query/lora/lora_b"] == (RANK, 2, 8)
    assert shapes["mix/lora/lora_a"] == (2, 8, RANK)
    assert shapes["mix/lora/lora_b"] == (2, RANK, 8)
    assert shapes["out/lora/lora_a"] == (2, 8, RANK)
    assert layer.axes["layers/0/parts/0/lora/lora_a"] == ("embed", None)
    assert layer.axes["layers/0/parts/0/lora/lora_b"] == (None, "hidden")
    assert layer.axes["layers/0/parts/1/lora/lora_a"] == ("hidden", None)


def test_modules_and_constructors_draw_the_same_adapters():
    of_constructors = first_values(meshpipe.lora([Block, Block], rank=RANK), seed=5)
    of_modules = first_values(meshpipe.lora([ready(Block), ready(Block, 2)], rank=RANK, seed=5))
    for path, value in of_modules.items():
        if path.endswith(FACTORS):
            np.testing.assert_array_equal(value, of_constructors[path])


def test_an_adapted_module_begins_as_its_base_and_leaves_it_alone():
    base = [ready(make) for make in (LAYERS[0], Block)]
    before = jax.tree.map(jnp.copy, nnx.state(nnx.List(base)))
    adapted = meshpipe.lora(base, rank=RANK, targets=("*",))
    x = jnp.arange(16)
    np.testing.assert_array_equal(chain(adapted, x), chain(base, x))
    with_values(adapted)
    assert np.abs(chain(adapted, x) - chain(base, x)).max() > 0.01
    assert type(base[1].query) is nnx.LinearGeneral
    jax.tree.map(np.testing.assert_array_equal, nnx.state(nnx.List(base)), before)
    assert adapted[1].query.kernel is base[1].query.kernel


@pytest.mark.parametrize("stabilised", [False, True])
def test_an_adapter_computes_what_the_paper_says(stabilised):
    linear = nnx.Linear(6, 5, rngs=nnx.Rngs(0))
    (adapted,) = with_values(meshpipe.lora([linear], rank=4, alpha=6.0, rank_stabilised=stabilised))
    x = jax.random.normal(jax.random.key(1), (3, 6))
    a, b = adapted.lora.lora_a[...], adapted.lora.lora_b[...]
    expected = x @ linear.kernel[...] + linear.bias[...] + (x @ a @ b) * (6.0 / (2 if stabilised else 4))
    np.testing.assert_allclose(adapted(x), expected, rtol=1e-6, atol=1e-6)


def test_an_embedding_is_adapted_both_ways():
    table = nnx.Embed(10, 6, rngs=nnx.Rngs(0))
    (adapted,) = with_values(meshpipe.lora([table], rank=3, targets=["layers/0"]))
    whole = table.embedding[...] + delta(adapted)
    np.testing.assert_allclose(adapted(jnp.arange(10)), whole, rtol=1e-5, atol=1e-5)
    query = jax.random.normal(jax.random.key(1), (3, 6))
    np.testing.assert_allclose(adapted.attend(query), query @ whole.T, rtol=1e-5, atol=1e-5)


def test_a_general_linear_with_a_batch_axis_is_adapted():
    general = nnx.LinearGeneral(4, (3, 2), axis=(1,), batch_axis={0: 5}, rngs=nnx.Rngs(0))
    (adapted,) = with_values(meshpipe.lora([general], rank=2))
    x = jax.random.normal(jax.random.key(1), (5, 4, 7))
    expected = jnp.einsum("bin,biop->bnop", x, general.kernel[...] + delta(adapted))
    np.testing.assert_allclose(adapted(x), expected, rtol=1e-5, atol=1e-5)


def test_letters_of_the_factors_of_an_einsum():
    assert einsum_of_factors("nta,hab->nthb") == ("nta,ac->ntc", "ntc,chb->nthb")
    assert einsum_of_factors("...hd,hde->...he") == ("...hd,hda->...ha", "...ha,hae->...he")


def test_a_bfloat16_base_has_float32_adapters_and_computes_in_bfloat16():
    base = ready(Block, param_dtype=jnp.bfloat16)
    (adapted,) = meshpipe.lora([base], rank=RANK)
    assert adapted.query.lora.lora_a.dtype == jnp.float32
    x = jax.random.normal(jax.random.key(0), (4, 8), jnp.bfloat16)
    np.testing.assert_array_equal(adapted(x), base(x))
    assert with_values([adapted])[0](x).dtype == jnp.bfloat16


def test_dropout_of_adapters_is_for_training_alone():
    (adapted,) = with_values(meshpipe.lora([nnx.Linear(8, 8, rngs=nnx.Rngs(0))], rank=2, dropout=0.5))
    (plain,) = with_values(meshpipe.lora([nnx.Linear(8, 8, rngs=nnx.Rngs(0))], rank=2))
    x = jnp.ones((4, 8))
    adapted.eval()
    np.testing.assert_array_equal(adapted(x), plain(x))
    adapted.train()
    assert np.abs(adapted(x) - plain(x)).max() > 0.01


def test_layers_that_share_a_module_share_its_adapter():
    table = nnx.Embed(16, 8, rngs=nnx.Rngs(0))
    layers = [table, meshpipe.call(table, lambda table, x: table.attend(x))]
    adapted = meshpipe.lora(layers, rank=2, targets=["layers/0"])
    assert adapted[0] is adapted[1].layer
    both = abstract_layers(adapted, ["inputs"])
    assert both[1].shared["layers/1/lora/lora_a"] == ("layers/0/lora/lora_a", "layers/1/lora/lora_a")


class Holder(nnx.Module):
    def __init__(self, part: nnx.Linear):
        self.part = part

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.part(x)


@pytest.mark.parametrize("targets", [None, ["*"], ["part"], ["layers/0/part"], ["layers/2/part"]])
def test_a_part_of_several_layers_gets_one_adapter_by_any_of_its_names(targets):
    part = nnx.Linear(8, 8, rngs=nnx.Rngs(0))
    first, _, last = meshpipe.lora([Holder(part), jnp.tanh, Holder(part)], rank=2, targets=targets)
    assert first.part is last.part
    assert first.part.lora.lora_a.shape == (8, 2)
    assert type(meshpipe.merge_lora([first, last])[0].part) is nnx.Linear
    assert not hasattr(part, "lora")


def test_a_constructor_that_stands_in_several_places_still_does():
    layers = meshpipe.lora([Block, Block, jnp.tanh], rank=RANK)
    assert layers[0] is layers[1]
    assert layers[2] is jnp.tanh
    some = meshpipe.lora([Block, Block, Block], rank=RANK, targets=["layers/0/query", "layers/2/*"])
    assert some[1] is Block
    assert some[0] is not some[2]
