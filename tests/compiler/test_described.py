"""Programs for devices that are not here: kept between runs, and refused where they do not fit."""

import signal
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from meshpipe.compiler.cache import CompileCache, without_jax_cache
from meshpipe.compiler.compiler import Compiler
from meshpipe.compiler.described import DescribedProgram
from meshpipe.compiler.refusal import CompilerError, compiling_stage
from meshpipe.compiler.reload import compile_noting_origin
from meshpipe.compiler.topology import devices_of, target_config
from meshpipe.hardware.catalogue import find_hardware
from meshpipe.hardware.target_name import parse_target
from meshpipe.mesh import is_described, make_mesh, submeshes


@pytest.fixture(scope="module")
def ranks():
    pytest.importorskip("libtpu")
    return submeshes(make_mesh(2, 2, devices=devices_of(parse_target("tpu:v5e:2x2"))))


def lowered(mesh, rows=8):
    x = jax.ShapeDtypeStruct((rows, 128), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("data")))
    return jax.jit(lambda x: (jnp.tanh(x), x.sum()), donate_argnums=0).lower(x)


def test_processes_that_are_started_later_still_hear_a_hangup(ranks) -> None:
    """libtpu, which describes the devices, ignores SIGHUP when it starts."""
    child = subprocess.run(["cat", "/proc/self/status"], capture_output=True, text=True, check=True, timeout=60)
    (ignored,) = (line.split()[1] for line in child.stdout.splitlines() if line.startswith("SigIgn"))
    assert not int(ignored, 16) >> (signal.SIGHUP - 1) & 1


def test_an_equal_program_is_compiled_once_and_known_on_every_submesh(ranks) -> None:
    compiler = Compiler()
    first = compiler.compile(lowered(ranks[0]), ranks[0])
    second = compiler.compile(lowered(ranks[1]), ranks[1])
    assert isinstance(first, DescribedProgram)
    assert second.text is first.text
    assert [s.mesh for s in jax.tree.leaves(second.output_shardings)] == [ranks[1]] * 2
    copy = compiler.copy(first, ranks[1])
    assert isinstance(copy, DescribedProgram)
    assert copy.mesh == ranks[1]
    assert first.memory.aliased == first.memory.arguments == 4 * 4 * 128
    with pytest.raises(RuntimeError, match="cannot run"):
        first(None)


def test_what_is_known_of_a_program_is_kept_for_later_runs(ranks, tmp_path: Path, monkeypatch) -> None:
    first = Compiler(CompileCache(tmp_path / "cache"), "a").compile(lowered(ranks[0]), ranks[0])
    (file,) = (tmp_path / "cache").iterdir()

    def refuse(*arguments):
        raise AssertionError("compiled again")

    monkeypatch.setattr("meshpipe.compiler.compiler.describe", refuse)
    again = Compiler(CompileCache(tmp_path / "cache"), "a").compile(lowered(ranks[0]), ranks[0])
    assert (again.text, again.memory, again.costs) == (first.text, first.memory, first.costs)
    assert again.output_shardings == first.output_shardings
    with pytest.raises(AssertionError, match="compiled again"):  # other devices of the same name
        Compiler(CompileCache(tmp_path / "cache"), "b").compile(lowered(ranks[0]), ranks[0])
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(AssertionError, match="compiled again"):  # a damaged file
        Compiler(CompileCache(tmp_path / "cache"), "a").compile(lowered(ranks[0]), ranks[0])


def test_programs_for_described_devices_do_not_go_through_the_cache_of_jax(ranks, cache_of_jax: Path, recwarn) -> None:
    """JAX would write them, and warn that it cannot read them. What is compiled for real devices stays in its cache."""
    on_cpu = lowered(make_mesh(2, 2), rows=12)
    on_cpu.compile()
    before = {path.name for path in cache_of_jax.iterdir()}
    assert before
    for _ in range(2):
        found = Compiler().compile(lowered(ranks[0]), ranks[0])
        assert isinstance(found, DescribedProgram)
        assert {path.name for path in cache_of_jax.iterdir()} == before
        assert jax.config.values["jax_enable_compilation_cache"]
    assert not compile_noting_origin(on_cpu, None)[1]
    assert not [warning for warning in recwarn if "cache" in str(warning.message)]


def test_the_cache_of_jax_is_on_again_after_the_last_thread_that_does_without(cache_of_jax: Path) -> None:
    with without_jax_cache():
        with without_jax_cache():
            assert not jax.config.values["jax_enable_compilation_cache"]
        assert not jax.config.values["jax_enable_compilation_cache"]
    assert jax.config.values["jax_enable_compilation_cache"]


def test_of_a_program_that_is_refused_for_its_size_it_is_known_how_much_it_needs(ranks, tmp_path: Path) -> None:
    for _ in range(2):  # the second time from the cache
        found = Compiler(CompileCache(tmp_path / "cache")).compile(lowered(ranks[0], 2**27), ranks[0])
        assert found.is_refused
        assert found.memory.arguments == 2**27 * 128 * 4 / 2  # split over data
        assert found.memory.arguments + found.memory.temporaries >= 2**35
        assert [sharding.spec for sharding in jax.tree.leaves(found.output_shardings)] == [
            PartitionSpec("data"),
            PartitionSpec(),
        ]


def test_what_the_compiler_says_otherwise_is_one_line(ranks) -> None:
    shape = jax.ShapeDtypeStruct((2**22, 2**10), jnp.int8, sharding=NamedSharding(ranks[0], PartitionSpec()))
    sort = jax.jit(lambda x: jnp.sort(x.reshape(-1))).lower(shape)
    with pytest.raises(CompilerError, match=r"For TPU v5 lite, it refuses lambda: .*[Ss]ort") as caught:
        Compiler().compile(sort, ranks[0])
    assert "\n" not in str(caught.value)
    with pytest.raises(CompilerError, match=r"it refuses lambda of stage 3: .*[Ss]ort"), compiling_stage(3):
        Compiler().compile(sort, ranks[0])


def test_devices_that_are_here_are_not_only_described(ranks) -> None:
    assert is_described(ranks[0])
    assert not is_described(make_mesh(2))


def test_a_gpu_is_described_in_the_words_of_xla() -> None:
    text = target_config(find_hardware("h100"))
    for line in (
        "core_count: 132",
        "memory_bandwidth: 3352320000000",
        "{ major: 9 minor: 0 }",
        "device_memory_size: 8",
    ):
        assert line in text


def test_a_missing_compiler_is_one_line_that_says_what_to_install(monkeypatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for text, extra in (("tpu:v5p:2x2x1", "tpu-target"), ("gpu:h100:8", "gpu-target")):
        with pytest.raises(ValueError, match="must be installed: pip install") as caught:
            devices_of(parse_target(text))
        assert f"pip install 'meshpipe[{extra}]'" in str(caught.value)
        assert "\n" not in str(caught.value)
