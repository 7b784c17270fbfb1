"""Flax's tree mode: meshpipe takes layers apart in graph mode all the same, so that layers that share parts train."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from flax import config as flax_config
from flax import nnx

from meshpipe import PipelineConfig, Trainer, make_mesh
from meshpipe.layers.examine import abstract_layers

WIDTH = 4
ROOT = Path(__file__).resolve().parents[2]


class Shared(nnx.Module):
    """Holds one module under two names, a random stream, batch statistics, and another holder of its kernel."""

    def __init__(self, rngs: nnx.Rngs):
        self.first = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.again = nnx.Dict({"and": self.first})
        self.kernel = self.first.kernel
        self.norm = nnx.BatchNorm(WIDTH, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.drop(self.norm(self.again["and"](self.first(x)))) @ self.kernel[...]


def losses() -> list[float]:
    """Of three updates of two stages: made by a constructor, and a ready-made one whose kernel a third layer shares."""
    ready = Shared(nnx.Rngs(1))
    last = nnx.Linear(WIDTH, WIDTH, rngs=nnx.Rngs(2))
    last.kernel = ready.kernel
    batch = {"inputs": np.random.default_rng(0).normal(size=(4, WIDTH)).astype(np.float32)}
    trainer = Trainer(
        [Shared, ready, last],
        lambda output, microbatch: (((output - 1) ** 2).sum(), output.size),
        optax.adam(0.01),
        batch=batch,
        mesh=make_mesh(2),
        pipeline=PipelineConfig(num_microbatches=2),
    )
    found = [float(trainer.step(batch).loss) for _ in range(3)]
    return [*found, trainer.evaluate([batch])["loss"]]


def test_a_training_is_the_same_in_a_process_of_tree_mode() -> None:
    program = (
        "import json, jax; jax.config.update('jax_num_cpu_devices', 2)\n"
        "from flax import config; assert config.nnx_graph_mode is False\n"
        "from test_tree_mode import losses; print(json.dumps(losses()))"
    )
    paths = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    run = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": paths, "JAX_PLATFORMS": "cpu", "NNX_GRAPH_MODE": "false"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert run.returncode == 0, run.stderr
    with nnx.set_graph_mode(True):
        expected = losses()
    assert len(set(expected)) == len(expected)
    assert json.loads(run.stdout) == expected


def test_switches_of_shared_modules_are_seen_in_tree_mode() -> None:
    class Fixed(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.norm = nnx.BatchNorm(WIDTH, use_running_average=True, rngs=rngs)
            self.same = self.norm

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.same(self.norm(x))

    with nnx.set_graph_mode(False):
        (layer,) = abstract_layers([Fixed], ())
    assert layer.pinned == ("layers/0/norm.use_running_average",)
    assert len(layer.params) == 2


@pytest.mark.parametrize("graph", [True, False])
def test_the_mode_of_a_users_own_call_stays(graph: bool) -> None:
    """A layer that asks for its mode finds the user's, and one that cannot be taken apart in it is none of ours."""
    seen = []

    class Asks(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            seen.append(nnx.set_graph_mode.current_value())

        def __call__(self, x: jax.Array) -> jax.Array:
            return x

    with nnx.set_graph_mode(graph):
        abstract_layers([Asks], ())
    assert set(seen) == {graph}
    assert nnx.set_graph_mode.current_value() is flax_config.nnx_graph_mode
