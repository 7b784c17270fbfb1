"""What must be the same to the last bit: schedules on the same stages, stages on one device or several, beginnings."""

import jax
import numpy as np
import optax
import pytest
import small_model

import meshpipe.layers.staged_model
from meshpipe import PipelineConfig, Trainer, make_mesh
from meshpipe.layers.examine import abstract_layers
from meshpipe.layers.initialise import initialise
from meshpipe.mesh import submeshes
from meshpipe.sharding import ShardingRules
from meshpipe.stage.target import CPU

ROWS = small_model.batches(3)


def train(mesh, **pipeline):
    """Losses, norms and final parameters and state of three updates."""
    trainer = Trainer(
        small_model.LAYERS,
        small_model.loss,
        optax.adamw(1e-2),
        batch=ROWS[0],
        mesh=mesh,
        pipeline=PipelineConfig(num_microbatches=4, **pipeline),
        clip_norm=0.5,
    )
    results = [trainer.step(row) for row in ROWS]
    scalars = [np.asarray((r.loss, r.grad_norm)).tobytes() for r in results]
    leaves = {path: np.asarray(leaf).tobytes() for path, leaf in {**trainer.params, **trainer.state}.items()}
    return scalars, leaves


@pytest.fixture(scope="module")
def one_f_one_b():
    return train(make_mesh(4))


def test_gpipe_and_1f1b_give_the_same_bits(one_f_one_b):
    assert train(make_mesh(4), schedule="gpipe") == one_f_one_b


def test_recomputation_gives_the_same_bits(one_f_one_b):
    assert train(make_mesh(4), remat="full") == one_f_one_b


def test_the_same_stages_on_one_device_give_the_same_bits(one_f_one_b):
    assert train(make_mesh(1), schedule="gpipe", stages_per_rank=4) == one_f_one_b


def test_the_same_ranks_on_one_device_give_the_same_bits(one_f_one_b, monkeypatch):
    (only,) = submeshes(make_mesh(1))
    monkeypatch.setattr(meshpipe.layers.staged_model, "submeshes", lambda mesh: (only,) * 4)
    assert train(make_mesh(4)) == one_f_one_b


@pytest.mark.parametrize("sizes", [(4, 1, 1), (1, 2, 1), (2, 2, 2)])
def test_initial_parameters_depend_on_seed_and_path_alone(sizes):
    layers = abstract_layers(small_model.LAYERS, ROWS[0])

    def made(sizes, seed):
        ranks = submeshes(make_mesh(*sizes))
        places = [(layer, ranks[index % len(ranks)]) for index, layer in enumerate(layers)]
        return jax.device_get(initialise(places, ShardingRules(), seed, CPU))

    plain, laid_out, other = made((1, 1, 1), 0), made(sizes, 0), made(sizes, 1)
    same = jax.tree.map(lambda a, b: a.tobytes() == b.tobytes(), plain, laid_out)
    assert all(jax.tree.leaves(same))
    kernels = [params["layers/1/up/kernel"] for params, _ in (laid_out[1], other[1])]
    assert not np.array_equal(*kernels)
    same_kind = laid_out[1][0]["layers/1/up/kernel"], laid_out[3][0]["layers/3/up/kernel"]
    assert not np.array_equal(*same_kind)
