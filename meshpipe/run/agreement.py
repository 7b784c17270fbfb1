"""Whether all processes of a run would run the same step, told before the first array moves between them."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from meshpipe.mesh import describe
from meshpipe.pipeline.peers import by_sockets
from meshpipe.plan.rendezvous import check_program
from meshpipe.processes.coordination import ask, process_count, process_index, tell
from meshpipe.run.record import versions
from meshpipe.trainer import Trainer

COMPILE_SECONDS = 3600.0
"""How long processes wait for each other to compile."""
_HASH = "#"
"""Begins a value that people cannot read."""


def agree(trainer: Trainer) -> None:
    """Meets the other processes before the first transfer: all is compiled, and all would run the same step.

    Process 0 compares, so that the messages grow with the number of processes and no faster. Raises `ValueError`, in
    every process, naming what differs where, and when ranks could wait for each other for ever.
    """
    check_program(trainer.model.program)
    tell(f"meshpipe/agreement/{process_index()}", json.dumps(describe_step(trainer)))
    if process_index() == 0:
        told = (ask(f"meshpipe/agreement/{process}", COMPILE_SECONDS) for process in range(process_count()))
        tell("meshpipe/agreement", json.dumps(differences([json.loads(text) for text in told])))
    found = json.loads(ask("meshpipe/agreement", COMPILE_SECONDS))
    if found:
        raise ValueError(
            f"All processes must run the same step. Got: {'; '.join(found)}. "
            "Start all with the same command, code and packages."
        )


def describe_step(trainer: Trainer) -> dict[str, str]:
    """What has to be the same in every process, by name, in words or as a hash.

    Of what crosses from stage to stage it has what this process knows: the boundaries of its own stages.
    """
    model, plan = trainer.model, trainer.plan
    installed = versions()
    ranks = f"{plan.num_ranks} rank{'s' if plan.num_ranks > 1 else ''}"
    found = {
        "version of jax": installed["jax"],
        "version of meshpipe": installed["meshpipe"],
        "mesh": describe(trainer.mesh),
        "devices": _hash([(device.process_index, device.id) for device in trainer.mesh.devices.flat]),
        "way to move arrays": "sockets" if by_sockets() else "the backend's own",
        "seed": str(trainer.seed),
        "batch": ", ".join(f"{name} {_shape(shape)}" for name, shape in sorted(model.microbatches.shapes.items())),
        "plan": f"{plan.schedule} of {plan.num_stages} stages on {ranks}, {plan.num_microbatches} microbatches",
        "instructions": _hash(model.program.to_text()),
    }
    for s, tree in enumerate(trainer.abstract_state_tree()):
        parts = {part: {path: _shape(leaf) for path, leaf in leaves.items()} for part, leaves in tree.items()}
        found[f"parameters and state of stage {s}"] = _hash(parts)
    for s, stage in model.traced.items():
        for first, boundary in ((s - 1, stage.boundary_in), (s, stage.boundary_out)):
            if boundary is not None:
                shapes = boundary.on(model.stages[first + 1].submesh, stage.microbatch_size)
                found[f"values from stage {first} to {first + 1}"] = _hash(
                    [repr(boundary.treedef), *map(_shape, shapes)]
                )
    return found


def differences(descriptions: Sequence[Mapping[str, str]]) -> list[str]:
    """A sentence for each process that differs from a process before it, in what both have described."""
    first: dict[str, tuple[int, str]] = {}
    sentences = []
    for process, description in enumerate(descriptions):
        parts = []
        for name, value in description.items():
            other, expected = first.setdefault(name, (process, value))
            if value != expected:
                parts.append(name if value.startswith(_HASH) else f"{name} ({value}, not {expected})")
                if other:
                    parts[-1] += f" than process {other}"
        if parts:
            sentences.append(f"process {process} has another {', '.join(parts)}")
    return sentences


def _shape(leaf: jax.ShapeDtypeStruct) -> str:
    spec = getattr(leaf.sharding, "spec", None)
    return f"{leaf.dtype}{list(leaf.shape)}" + ("" if spec is None else f" {tuple(spec)}")


def _hash(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    return _HASH + hashlib.sha256(text.encode()).hexdigest()[:16]
