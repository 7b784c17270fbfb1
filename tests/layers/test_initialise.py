"""Initial values depend on seed and path alone, whatever the layout, and are born where they live."""

import functools
import gc
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import meshpipe.compiler.compiler
from meshpipe import PipelineConfig, Trainer
from meshpipe.layers.examine import abstract_layers
from meshpipe.layers.initialise import initialise, placed
from meshpipe.layers.layer import LayerLike
from meshpipe.mesh import make_mesh, submeshes
from meshpipe.sharding import ShardingRules
from meshpipe.stage.target import CPU

WIDTH = 8
RULES = ShardingRules()
(ONE,) = submeshes(make_mesh(1))
(TWO_BY_TWO,) = submeshes(make_mesh(1, 2, 2))
RANKS = submeshes(make_mesh(4))
SPLIT = nnx.with_partitioning(nnx.initializers.lecun_normal(), (None, "hidden"))


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.up = nnx.Linear(WIDTH, 2 * WIDTH, kernel_init=SPLIT, rngs=rngs)
        self.norm = nnx.BatchNorm(2 * WIDTH, rngs=rngs)
        self.offset = nnx.Variable(jax.random.uniform(rngs.params(), (WIDTH,)))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.norm(self.up(x))


def made(layers: list[LayerLike], meshes: list[Mesh], seed: int = 0) -> dict[str, jax.Array]:
    abstract = abstract_layers(layers, ("inputs",))
    results = initialise(list(zip(abstract, meshes, strict=True)), RULES, seed, CPU)
    return {path: leaf for pair in results for leaves in pair for path, leaf in leaves.items()}


@pytest.fixture(scope="module")
def on_one_device() -> dict[str, jax.Array]:
    return made([Block] * 4, [ONE] * 4)


@pytest.mark.parametrize("meshes", [list(RANKS), [RANKS[0], RANKS[0], RANKS[3], RANKS[3]], [TWO_BY_TWO] * 4])
def test_the_layout_changes_no_bit(on_one_device: dict[str, jax.Array], meshes: list[Mesh]) -> None:
    found = made([Block] * 4, meshes)
    assert found.keys() == on_one_device.keys()
    for path, leaf in on_one_device.items():
        np.testing.assert_array_equal(found[path], leaf, err_msg=path)
        assert set(found[path].devices()) <= set(meshes[int(path.split("/")[1])].devices.flat)


def test_layers_and_seeds_draw_different_values(on_one_device: dict[str, jax.Array]) -> None:
    again = made([Block], [ONE], seed=1)
    draws = [on_one_device[f"layers/{i}/up/kernel"] for i in range(4)] + [again["layers/0/up/kernel"]]
    assert len({np.asarray(draw).tobytes() for draw in draws}) == 5
    offsets = {np.asarray(on_one_device[f"layers/{i}/offset"]).tobytes() for i in range(4)}
    assert len(offsets) == 4


def test_a_layer_does_not_depend_on_those_beside_it(on_one_device: dict[str, jax.Array]) -> None:
    beside = made([nnx.Linear(2, 2, rngs=nnx.Rngs(0)), Block, functools.partial(nnx.Linear, 3, 3)], [ONE] * 3)
    for path in ("up/kernel", "offset"):
        np.testing.assert_array_equal(beside[f"layers/1/{path}"], on_one_device[f"layers/1/{path}"])


def test_leaves_are_placed_by_the_rules() -> None:
    (layer,) = abstract_layers([Block], ("inputs",))
    params, state = placed(layer, TWO_BY_TWO, RULES)
    assert params["layers/0/up/kernel"].sharding.spec == P(None, "tensor")
    assert params["layers/0/up/bias"].sharding.spec == state["layers/0/norm/mean"].sharding.spec == P()
    found = made([Block], [TWO_BY_TWO])
    for path, shape in {**params, **state}.items():
        assert found[path].sharding == shape.sharding
        assert (found[path].shape, found[path].dtype) == (shape.shape, shape.dtype)


def test_layers_that_are_alike_share_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []

    def count(*arguments: Any) -> jax.stages.Compiled:
        compiled.append(arguments)
        return compile_one(*arguments)

    compile_one = meshpipe.compiler.compiler._compile
    monkeypatch.setattr(meshpipe.compiler.compiler, "_compile", count)
    # Layers on other submeshes are moved there; loading the program for them would take longer.
    monkeypatch.setattr(meshpipe.compiler.compiler, "load", lambda *arguments: pytest.fail("a program was loaded"))
    made([Block, Block, functools.partial(nnx.Linear, 3, 3), Block], [RANKS[0], RANKS[1], RANKS[0], RANKS[3]])
    assert len(compiled) == 2


def test_layers_with_other_constants_do_not() -> None:
    def holds(constant: np.ndarray) -> LayerLike:
        class Constant(nnx.Module):
            def __init__(self, rngs: nnx.Rngs):
                self.value = nnx.Param(jnp.asarray(constant))

            def __call__(self, x: jax.Array) -> jax.Array:
                return x

        return Constant

    first = np.arange(30_000, dtype=np.float32)
    second = np.where(first == 20_000, -1, first)
    found = made([holds(first), holds(second)], [ONE] * 2)
    np.testing.assert_array_equal(found["layers/0/value"], first)
    np.testing.assert_array_equal(found["layers/1/value"], second)


def test_the_values_of_a_ready_made_module_are_copied() -> None:
    ready = nnx.BatchNorm(WIDTH, rngs=nnx.Rngs(0))
    ready.scale[...] = jnp.arange(8.0)
    found = made([ready], [ONE])
    np.testing.assert_array_equal(found["layers/0/scale"], np.arange(8.0))
    for leaf in found.values():
        leaf.delete()  # as a step does that donates them
    np.testing.assert_array_equal(ready.scale[...], np.arange(8.0))


@pytest.mark.parametrize("kept", [False, True])
def test_a_ready_made_module_is_let_go_of_once_it_is_copied(kept: bool) -> None:
    """Built on a device that is in no submesh, where nothing may be left of it but what the user still holds."""
    elsewhere = jax.devices()[-1]

    def bytes_elsewhere() -> int:
        gc.collect()
        return sum(leaf.nbytes for leaf in jax.live_arrays() if elsewhere in leaf.devices())

    before = bytes_elsewhere()
    with jax.default_device(elsewhere):
        ready = nnx.BatchNorm(WIDTH, rngs=nnx.Rngs(0))
        layers = [ready, lambda rngs: nnx.Linear(WIDTH, WIDTH, rngs=rngs), lambda rngs: captured]
        captured = nnx.Linear(WIDTH, WIDTH, rngs=nnx.Rngs(1))
    built = bytes_elsewhere()
    batch = {"inputs": np.ones((2, WIDTH), np.float32)}
    trainer = Trainer(
        layers,
        lambda output, batch: (output.sum(), output.size),
        optax.sgd(0.1),
        batch=batch,
        mesh=make_mesh(2, devices=jax.devices()[:2]),
        pipeline=PipelineConfig(num_microbatches=1),
    )
    np.testing.assert_array_equal(trainer.params["layers/0/scale"], ready.scale[...])
    del layers, captured
    if not kept:
        del ready
    assert before < built
    assert bytes_elsewhere() == before if not kept else bytes_elsewhere() > before
    trainer.check(trainer.step(batch))
    assert np.isfinite(trainer.evaluate([batch])["loss"])


def test_a_leaf_that_cannot_be_split_is_named() -> None:
    narrow = functools.partial(nnx.Linear, 3, 3, kernel_init=SPLIT)
    with pytest.raises(ValueError, match="layers/0/kernel has 3 hidden in dim 1, and the mesh axis tensor has 2"):
        made([narrow], [TWO_BY_TWO])
