"""What is private in JAX: in three modules alone, imported late, and not needed by one process."""

import ast
import os
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "meshpipe"
PRIVATE = {"jax._src", "jaxlib"}
MODULES = {"processes/coordination.py", "compiler/reload.py", "compiler/described_cudnn.py"}

TRAIN = """
import builtins

its_own = builtins.__import__

def refuse(name, globals=None, locals=None, fromlist=(), level=0):
    importer = (globals or {}).get("__name__", "").partition(".")[0]
    wanted = {name, *(f"{name}.{part}" for part in fromlist or ())}
    private = ("jax._src", "jaxlib", "jax.experimental.transfer")
    if importer == "meshpipe" and any(part.startswith(private) for part in wanted):
        raise ImportError(f"{name} has moved")
    return its_own(name, globals, locals, fromlist, level)

builtins.__import__ = refuse

import numpy as np
import optax
from flax import nnx
import meshpipe

meshpipe.use_cpu_devices(3)
batch = {"inputs": np.ones((4, 4), np.float32)}
trainer = meshpipe.Trainer(
    [lambda rngs: nnx.Linear(4, 4, rngs=rngs)] * 3,
    lambda output, batch: (((output - 1) ** 2).sum(), 16),
    optax.sgd(0.01),
    batch=batch,
    mesh=meshpipe.make_mesh(3),
    pipeline=meshpipe.PipelineConfig(num_microbatches=2),
)
losses = []
for _ in range(3):
    result = trainer.step(batch)
    trainer.check(result)
    losses.append(float(result.loss))
assert losses[2] < losses[1] < losses[0], losses
print(trainer.evaluate([batch])["loss"] < losses[2])
"""


def test_one_process_trains_without_it() -> None:
    # Programs cannot be copied to other submeshes then, so the middle stages are compiled each for itself.
    environment = os.environ | {"PYTHONPATH": str(PACKAGE.parent)}
    run = subprocess.run([sys.executable, "-c", TRAIN], env=environment, capture_output=True, text=True, timeout=120)
    assert run.stdout == "True\n", run.stderr


def imports(tree: ast.AST) -> list[tuple[ast.stmt, str]]:
    found: list[tuple[ast.stmt, str]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            found += [(node, f"{node.module}.{alias.name}") for alias in node.names]
    return found


def test_private_parts_of_jax_are_imported_late_and_in_three_modules() -> None:
    found = set()
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text())
        for node, name in imports(tree):
            if name.startswith(tuple(PRIVATE)):
                found.add(str(path.relative_to(PACKAGE)))
                assert node not in tree.body, f"{path} imports {name} when it is imported itself"
    assert found == MODULES
