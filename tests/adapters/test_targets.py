"""Targets and sizes of adapters that cannot be: each is an error that says so."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import meshpipe
from meshpipe.adapters.config import LoraConfig
from tests.adapters.lora_model import LAYERS, Block, ready


class Twice(nnx.Linear):
    def __call__(self, x: jax.Array) -> jax.Array:  # type: ignore[override]
        return 2 * super().__call__(x)


class Named(nnx.Linear):
    """Another class with the same computation."""


def adapted_paths(layers, **options):
    found = meshpipe.lora(layers, rank=2, **options)
    made = [ready(layer) for layer in found]
    state = nnx.state(nnx.List(made), nnx.LoRAParam, graph=True)
    return ["/".join(map(str, key[:-2])) for key, _ in nnx.to_flat_state(state) if key[-1] == "lora_a"]


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (None, ["1/mix", "1/out", "1/parts/0", "1/parts/1", "1/query", "2"]),
        (("*",), ["0", "1/mix", "1/out", "1/parts/0", "1/parts/1", "1/query", "2"]),
        (("query", "layers/2"), ["1/query", "2"]),
        (("parts/*",), ["1/parts/0", "1/parts/1"]),
        (("layers/1/*", "!mix"), ["1/out", "1/parts/0", "1/parts/1", "1/query"]),
    ],
)
def test_patterns_match_paths_or_their_ends(targets, expected):
    assert adapted_paths([LAYERS[0], Block, LAYERS[4]], targets=targets) == expected


def test_a_class_derived_from_one_of_flax_is_adapted_and_cut_off_again():
    (adapted,) = meshpipe.lora([Named(4, 4, rngs=nnx.Rngs(0))], rank=2)
    assert isinstance(adapted, Named)
    assert hasattr(adapted, "lora")
    (merged,) = meshpipe.merge_lora([adapted])
    assert type(merged) is Named
    assert not hasattr(merged, "lora")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, r"`rank` must be at least 1. Got 0, which is no adapter: give the layers themselves"),
        ({"rank": -1}, r"`rank` must be at least 1. Got -1"),
        ({"rank": True}, r"`rank` must be a whole number"),
        ({"alpha": 0.0}, r"`alpha` must be above 0"),
        ({"alpha": float("inf")}, r"`alpha` must be a finite number"),
        ({"dropout": 1.0}, r"`dropout` must be a number of at least 0 and below 1"),
        ({"param_dtype": "int7"}, r"`param_dtype` must be a floating dtype. Got 'int7'"),
        ({"param_dtype": jnp.int32}, r"`param_dtype` must be a floating dtype. Got .*int32"),
        ({"param_dtype": None}, r"`param_dtype` must be a floating dtype. Got None"),
        ({"seed": -1}, r"`seed` must be at least 0. Got -1"),
        ({"targets": "query"}, r"`targets` must be a list of patterns of paths. Got 'query'"),
        ({"targets": ["!query"]}, r"One of `targets` must say what gets an adapter"),
        (
            {"targets": []},
            r"must say what gets an adapter. Got \[\], which names nothing. Without `targets`, every linear",
        ),
        ({"groups": ["query"]}, r"must be a pattern, a colon and what is its own: rank or alpha. Got 'query'"),
        ({"groups": ["query:rank=x"]}, r"Got 'query:rank=x'. Write e.g. 'value:rank=16,alpha=32'"),
        ({"groups": ["query:rank=0"]}, r"whole number of at least 1. Got 0 for 'query'. `targets` leaves modules out"),
        ({"groups": ["query:alpha=0"]}, r"alpha of a group of `groups` must be a number above 0. Got 0.0 for 'query'"),
        ({"groups": ["qury:rank=1"]}, r"must match a module with an adapter. Got 'qury': it matches none"),
        ({"groups": ["q*:rank=1", "query:rank=2"]}, r"Got 'query': groups before it have all that it matches"),
        ({"rank": 2, "groups": ["layers/4:rank=5"]}, r"Got 5, and layers/4 has 8 inputs and 4 outputs"),
        ({"targets": ["qury"]}, r"'qury', which matches nothing; an adapter fits layers/0, layers/1/mix, .*, \.\.\."),
        ({"targets": ["query", "layers/7/*"]}, r"'layers/7/\*', which matches nothing"),
        ({"targets": ["norm"]}, r"'norm' names layers/1/norm, a LayerNorm. .* '!layers/1/norm'"),
        ({"targets": ["nor*"]}, r"'nor\*', which matches only layers/1/norm, a LayerNorm"),
        ({"rank": 5}, r"Got 5, and layers/4 has 8 inputs and 4 outputs. .* '!layers/4'"),
    ],
)
def test_what_cannot_be_is_an_error(options, message):
    with pytest.raises(ValueError, match=message):
        meshpipe.lora(LAYERS, **{"rank": 2, **options})


def test_a_module_that_computes_something_else_cannot_be_adapted():
    with pytest.raises(ValueError, match="a Twice, which computes something else than Linear"):
        meshpipe.lora([Twice(4, 4, rngs=nnx.Rngs(0))], rank=2, targets=["layers/0"])
    with pytest.raises(
        ValueError, match=r"'Twi\*', which matches nothing; an adapter fits none of the model's modules"
    ):
        meshpipe.lora([Twice(4, 4, rngs=nnx.Rngs(0)), jnp.tanh], rank=2, targets=["Twi*"])


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (
            lambda rngs: Twice(4, 4, rngs=rngs),
            "only layers/0, a Twice, which computes something else than Linear. An ad",
        ),
        (lambda rngs: nnx.LayerNorm(4, rngs=rngs), "none of these. An adapter fits none of the model's modules"),
        (LAYERS[0], r"none of these. An adapter fits layers/0: name what gets one in `targets`"),
    ],
)
def test_a_model_without_any_default_target_is_an_error_that_names_no_pattern(layer, reason):
    start = r"^By default every nnx.Linear, nnx.LinearGeneral, nnx.Einsum gets an adapter. Got a model which has "
    with pytest.raises(ValueError, match=start + reason):
        meshpipe.lora([layer, jnp.tanh], rank=2)


def test_no_second_adapter():
    (adapted,) = meshpipe.lora([nnx.Linear(4, 4, rngs=nnx.Rngs(0))], rank=2)
    with pytest.raises(ValueError, match="which has an adapter already"):
        meshpipe.lora([adapted], rank=2, targets=["layers/0"])
    with pytest.raises(ValueError, match=r"only layers/0, which has an adapter already. Train those .* meshpipe.merge"):
        meshpipe.lora([adapted], rank=2)


def test_an_einsum_that_sums_its_kernel_cannot_be_adapted():
    einsum = nnx.Einsum("ab,bcd->ac", (3, 4, 5), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="every dim of its kernel must be one of the input or the output"):
        meshpipe.lora([einsum], rank=2, targets=["layers/0"])


def test_the_config_says_what_a_rank_of_zero_ignores():
    assert LoraConfig().rank == 0
    with pytest.raises(ValueError, match=r"`alpha` is for adapters, and a `rank` of 0 has none. Got 8.0"):
        LoraConfig(alpha=8.0)
    with pytest.raises(ValueError, match=r"`rank` must be at least 0. Got -2"):
        LoraConfig(rank=-2)
