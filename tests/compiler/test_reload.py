"""A program loaded for other devices matches one compiled for them. Fails when private parts of JAX have moved."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from meshpipe.compiler.cache import JAX_SUBFOLDER, open_cache
from meshpipe.compiler.compiler import Compiler
from meshpipe.compiler.reload import compile_noting_origin, kept_arguments, load, serialise
from meshpipe.mesh import make_mesh, submeshes

ROWS = np.random.default_rng(0).normal(size=(8, 8)).astype(np.float32)
SPECS = (PartitionSpec(), PartitionSpec("data"), PartitionSpec(None, "tensor"), PartitionSpec("tensor"))


def lower(mesh):
    """Products split over both axes, so that they are summed across devices, added to a donated array."""
    shardings = [NamedSharding(mesh, spec) for spec in SPECS]

    def add(total, x, up, down):
        y = jnp.tanh(x @ up) @ down
        return total + y.T @ y, jax.nn.softmax(y).sum()

    shapes = [jax.ShapeDtypeStruct(ROWS.shape, ROWS.dtype, sharding=s) for s in shardings]
    return jax.jit(add, donate_argnums=0, out_shardings=(shardings[0],) * 2).lower(*shapes)


def arguments(mesh):
    return [jax.device_put(ROWS + i, NamedSharding(mesh, spec)) for i, spec in enumerate(SPECS)]


@pytest.mark.parametrize("sizes", [(2, 1, 1), (2, 2, 1), (2, 1, 2), (2, 2, 2)])
def test_a_loaded_program_does_what_a_compiled_one_does(sizes):
    source, target = submeshes(make_mesh(*sizes))
    lowered = lower(target)
    compiled, original = lowered.compile(), lower(source).compile()
    serialised = serialise(original, source)
    assert serialised is not None, "programs can no longer be had as bytes"
    loaded = load(serialised, target, lowered.in_tree, lowered.out_tree)
    assert loaded is not None, "programs can no longer be loaded for other devices"

    given = arguments(target)
    results, expected = loaded(*given), compiled(*arguments(target))
    for result, other in zip(results, expected, strict=True):
        np.testing.assert_array_equal(np.asarray(result), np.asarray(other))
        assert result.sharding == other.sharding
        assert result.devices() == set(target.devices.flat)
    assert [value.is_deleted() for value in given] == [True, False, False, False]
    assert loaded.input_shardings == compiled.input_shardings
    assert loaded.output_shardings == compiled.output_shardings
    assert loaded.memory_analysis().temp_size_in_bytes == compiled.memory_analysis().temp_size_in_bytes
    np.testing.assert_array_equal(original(*arguments(source))[0], expected[0])


def test_a_program_that_calls_python_stays_where_it_is():
    (mesh,) = submeshes(make_mesh(1))

    def shout(x):
        jax.debug.print("{}", x)
        return x + 1

    assert serialise(jax.jit(shout).lower(1.0).compile(), mesh) is None


def test_cache_hits_of_jax_are_distinguished_from_compilations(cache_of_jax):
    """Fails if JAX no longer reports it; programs that it loads must not be copied."""
    (mesh,) = submeshes(make_mesh(1))
    assert compile_noting_origin(lower(mesh), None)[1]
    assert not compile_noting_origin(lower(mesh), None)[1]
    jax.config.update("jax_enable_compilation_cache", False)
    try:  # JAX goes on with a cache that it has begun to use, before jax 0.12 by another key
        compile_noting_origin(lower(mesh), None)
        assert not compile_noting_origin(lower(mesh), None)[1]
    finally:
        jax.config.update("jax_enable_compilation_cache", True)


def test_programs_are_copied_where_the_cache_of_jax_is_in_use(cache_of_jax):
    """In the first run and in later ones, which find the programs of the first in a subfolder."""
    meshes = submeshes(make_mesh(4))
    for run in range(2):
        compiler = Compiler(open_cache(None))
        programs = [compiler.compile(lower(mesh), mesh) for mesh in meshes]
        for mesh, program in zip(meshes, programs, strict=True):
            total, _ = program(*arguments(mesh))
            assert total.devices() == set(mesh.devices.flat)
        # JAX compiled one program in the first run, and none in the second.
        assert len(list(cache_of_jax.glob("*-cache"))) == 1, run
        assert len(list((cache_of_jax / JAX_SUBFOLDER).iterdir())) == 1


def test_invalid_bytes_give_none():
    source, target = submeshes(make_mesh(2))
    lowered = lower(source)
    serialised = serialise(lowered.compile(), source)
    assert serialised is not None
    broken = type(serialised)(serialised.data[:-100], serialised.device_ids)
    assert load(broken, target, lowered.in_tree, lowered.out_tree) is None


def test_the_arguments_that_a_program_reads():
    first, second = (jax.jit(lambda *both, i=i: both[i] + 1).lower(1.0, 2.0) for i in (0, 1))
    assert first.as_text() == second.as_text()
    assert (kept_arguments(first), kept_arguments(second)) == ((0,), (1,))
