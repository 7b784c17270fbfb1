"""What caches take is known, and whether weights fit is checked, before anything is allocated."""

from collections.abc import Mapping
from typing import Any

import golden
import jax
import pytest
from jax.sharding import Mesh

from meshpipe import make_mesh
from meshpipe.choose import capacity
from meshpipe.errors import errors_name_flags
from meshpipe.generation import memory
from meshpipe.generation.config import SamplingConfig
from meshpipe.generation.generator import Generator
from meshpipe.stage.programs import StagePrograms

MODEL, LEAVES = golden.CONFIGS["gemma3"], golden.leaves("gemma3")
WEIGHTS = sum(leaf.nbytes for leaf in LEAVES.values())


def test_caches_take_what_was_predicted() -> None:
    generator = Generator(MODEL, LEAVES, mesh=make_mesh(2, 1, 2), batch_size=3)
    caches = generator.caches([[1, 2, 3]] * 5, SamplingConfig(max_tokens=30))
    assert str(caches).startswith("Caches of 2 groups of 3 texts of up to 32 positions take ")
    found = []
    for s in caches.whole.model.local:
        groups = [caches.whole.empty() for _ in range(caches.groups)] + [caches.few.empty()]
        arrays = [group[s][at] for group in groups for at in caches.whole.places_of_caches(s)]
        found.append(sum(array.addressable_shards[0].data.nbytes for array in arrays))
    assert list(caches.nbytes) == found


def test_weights_that_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capacity, "free_memory", lambda: WEIGHTS - 1)
    with pytest.raises(ValueError, match="The weights must fit into the memory of this machine"):
        Generator(MODEL, LEAVES)


@pytest.mark.parametrize(
    ("free", "way_out"),
    [
        (0.7 * WEIGHTS, r"Pass --mesh.pipeline 2, for 2 devices\. "),
        (0.4 * WEIGHTS, r"Pass --mesh.pipeline 3, for 3 devices\. "),
        (100, "Or make the tensor axis of the mesh larger, --mesh.tensor"),
    ],
)
def test_weights_that_fit_on_more_devices(free: float, way_out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on accelerators, each of which has memory of its own."""

    def of_each(mesh: Mesh) -> Mapping[Any, int | None]:
        return dict.fromkeys(mesh.devices.flat, int(free))

    monkeypatch.setattr(memory, "free_in", of_each)
    monkeypatch.setattr(memory, "on_cpu", lambda mesh: False)
    assert len(jax.devices()) >= 3
    with errors_name_flags(), pytest.raises(ValueError, match=f"memory of cpu:0. They need .*{way_out}"):
        Generator(MODEL, LEAVES)


def test_activations_that_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """What XLA says that the programs take; on CPU, ranks that wait take nothing."""
    mesh = make_mesh(2)
    square = jax.jit(lambda x: x @ x).lower(jax.ShapeDtypeStruct((256, 256), "float32")).compile()
    programs = dict.fromkeys(range(2), StagePrograms(prepare=None, zeros=lambda: ((), ()), forward=square))
    needed = 4 * 256 * 256

    def check(at_once: int, free: int) -> None:
        monkeypatch.setattr(capacity, "free_memory", lambda: free)
        memory.check_activations(programs, mesh, at_once=at_once, what="a test", way_out="Lower `batch_size`.")

    check(1, needed + 1000)
    check(2, 2 * needed + 2000)
    for at_once in (1, 2):
        with pytest.raises(ValueError, match=r"activations of a test must fit into the memory of this machine.* Lower"):
            check(at_once, at_once * needed - 1)
