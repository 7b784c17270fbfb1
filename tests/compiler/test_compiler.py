"""Equal programs are compiled once; programs that compute anything different are not equal."""

from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import meshpipe.compiler.compiler
from meshpipe.compiler.cache import CompileCache
from meshpipe.compiler.compiler import Compiler
from meshpipe.mesh import make_mesh, submeshes

MESHES = submeshes(make_mesh(4, 2))


pytestmark = pytest.mark.usefixtures("without_the_cache_of_jax")


@pytest.fixture
def compiled(monkeypatch):
    """Counts XLA's compilations."""
    lowered = []
    compile_it = meshpipe.compiler.compiler._compile
    monkeypatch.setattr(meshpipe.compiler.compiler, "_compile", lambda *a: (lowered.append(a[0]), compile_it(*a))[1])
    return lowered


def lower(mesh, function=jnp.sin, spec=PartitionSpec(), count=1, size=4, **options):  # noqa: B008
    sharding = NamedSharding(mesh, spec)
    shapes = [jax.ShapeDtypeStruct((size,), jnp.float32, sharding=sharding)] * count
    return jax.jit(function, out_shardings=sharding, **options).lower(*shapes)


def run(program, mesh, *values, size=4):
    sharding = program.input_shardings[0][0] if program.input_shardings[0] else NamedSharding(mesh, PartitionSpec())
    return np.asarray(program(*(jax.device_put(np.full(size, v, np.float32), sharding) for v in values)))


def test_equal_programs_of_all_submeshes_are_compiled_once(compiled):
    compiler = Compiler()
    with ThreadPoolExecutor() as pool:
        programs = list(pool.map(lambda mesh: compiler.compile(lower(mesh), mesh), MESHES))
    assert len(compiled) == 1
    programs.append(compiler.copy(programs[-1], MESHES[0]))  # a copy of a copy
    for program, mesh in zip(programs, [*MESHES, MESHES[0]], strict=True):
        np.testing.assert_array_equal(run(program, mesh, 2.0), run(programs[0], MESHES[0], 2.0))


big = np.zeros((300, 4), np.float32)
other = big.copy()
other[150, 1] = 1


@pytest.mark.parametrize(
    ("one", "two"),
    [
        ({"function": lambda x: x * 2}, {"function": lambda x: x * 3}),
        ({"function": lambda x: x + big.sum(0)}, {"function": lambda x: x + other.sum(0)}),
        ({"function": lambda x: x + jnp.asarray(big).sum(0)}, {"function": lambda x: x + jnp.asarray(other).sum(0)}),
        ({"function": lambda x, y: x + 1, "count": 2}, {"function": lambda x, y: y + 1, "count": 2}),
        ({}, {"spec": PartitionSpec("data")}),
        ({}, {"donate_argnums": 0}),
        ({"function": lambda x: jnp.ones(4), "size": 4}, {"function": lambda x: jnp.ones(4), "size": 8}),
        ({}, {"function": lambda x: [jnp.sin(x)]}),
    ],
    ids=[
        "constant",
        "large constant",
        "jax constant",
        "unused argument",
        "sharding",
        "donation",
        "unused shape",
        "structure",
    ],
)
def test_programs_that_differ_are_not_shared(one, two, compiled):
    compiler = Compiler()
    programs = [compiler.compile(lower(mesh, **kind), mesh) for kind, mesh in zip((one, two), MESHES, strict=False)]
    assert len(compiled) == 2
    for program, kind, mesh in zip(programs, (one, two), MESHES, strict=False):
        values = (1.0, 5.0)[: kind.get("count", 1)]
        size = {"size": kind.get("size", 4)}
        expected = run(lower(mesh, **kind).compile(), mesh, *values, **size)
        np.testing.assert_array_equal(run(program, mesh, *values, **size), expected)


def test_a_program_that_cannot_be_copied_is_compiled_for_every_submesh(compiled, capfd):
    def shout(x):
        jax.debug.print("value {}", x[0])
        return x + 1

    compiler = Compiler()
    programs = [compiler.compile(lower(mesh, shout), mesh) for mesh in MESHES[:2]]
    assert len(compiled) == 2
    assert compiler.copy(programs[0], MESHES[1]) is None
    for program, mesh in zip(programs, MESHES, strict=False):
        assert run(program, mesh, 1.0)[0] == 2.0


def test_an_error_of_the_compiler_reaches_every_waiter(monkeypatch):
    def fail(*_):
        raise RuntimeError("no space")

    monkeypatch.setattr(meshpipe.compiler.compiler, "_compile", fail)
    compiler = Compiler()
    for mesh in MESHES[:2]:
        with pytest.raises(RuntimeError, match="no space"):
            compiler.compile(lower(mesh), mesh)


def test_programs_of_an_earlier_run(compiled, tmp_path):
    cache = CompileCache(tmp_path / "new" / "folder")
    before = Compiler(cache).compile(lower(MESHES[1]), MESHES[1])
    compiler = Compiler(CompileCache(tmp_path / "new" / "folder"))
    loaded = [compiler.compile(lower(mesh), mesh) for mesh in MESHES]  # not those that it was compiled for
    assert len(compiled) == 1
    for program, mesh in zip(loaded, MESHES, strict=True):
        np.testing.assert_array_equal(run(program, mesh, 2.0), run(before, MESHES[1], 2.0))


def test_damaged_programs_are_compiled_again(compiled, tmp_path):
    Compiler(CompileCache(tmp_path)).compile(lower(MESHES[0]), MESHES[0])
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    for damaged in (whole[:-1] + bytes([whole[-1] ^ 1]), whole[:50], b""):
        file.write_bytes(damaged)
        program = Compiler(CompileCache(tmp_path)).compile(lower(MESHES[0]), MESHES[0])
        assert run(program, MESHES[0], 2.0)[0] == np.sin(np.float32(2))
    assert len(compiled) == 4
