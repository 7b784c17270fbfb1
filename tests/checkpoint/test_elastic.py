"""A checkpoint goes on with any other layout: the losses are those of the run that stayed where it was."""

import itertools

import numpy as np
import optax
import pytest
import small_model

from meshpipe import PipelineConfig, Trainer, make_mesh
from meshpipe.checkpoint import Checkpointer
from meshpipe.sharding import FULLY_SHARDED

ROWS = small_model.batches(4)
LAYOUTS = {
    "one device": {"mesh": (1, 1, 1), "schedule": "gpipe"},
    "two ranks of 2 x 2": {"mesh": (2, 2, 2)},
    "four ranks, split backward": {"mesh": (4, 1, 1), "schedule": "zb-h1"},
    "four stages on two ranks, tensor": {"mesh": (2, 1, 2), "schedule": "interleaved-1f1b", "stages_per_rank": 2},
    "fully sharded, uneven stages": {
        "mesh": (2, 4, 1),
        "partition": "0,1",
        "rules": FULLY_SHARDED,
    },
}


def start(layout):
    options = dict(LAYOUTS[layout])
    mesh, rules = make_mesh(*options.pop("mesh")), options.pop("rules", None)
    return Trainer(
        small_model.LAYERS,
        small_model.loss,
        optax.adamw(1e-2),
        batch=ROWS[0],
        mesh=mesh,
        pipeline=PipelineConfig(num_microbatches=4, **options),
        clip_norm=0.5,
        rules=rules,
    )


def losses(trainer, rows):
    return [float(trainer.step(row).loss) for row in rows]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """For each layout a trainer, the folder with its second step, and the losses of the two steps after it."""
    found = {}
    for number, layout in enumerate(LAYOUTS):
        trainer, folder = start(layout), tmp_path_factory.mktemp(f"layout-{number}")
        losses(trainer, ROWS[:2])
        with Checkpointer(folder) as checkpointer:
            checkpointer.save(2, trainer.state_tree(), {})
        found[layout] = trainer, folder, losses(trainer, ROWS[2:])
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("source", "target"), list(itertools.permutations(LAYOUTS, 2)))
def test_a_run_goes_on_with_another_layout(runs, source, target):
    trainer, folder, stayed = runs[target][0], runs[source][1], runs[source][2]
    trees = Checkpointer(folder).restore(2, trainer.abstract_state_tree())
    trainer.load_state_tree(trees, 2)
    np.testing.assert_allclose(losses(trainer, ROWS[2:]), stayed, rtol=2e-6)
