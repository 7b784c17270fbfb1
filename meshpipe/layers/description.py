"""Describes what must be the same in all processes that train a model: by name, in words or as a hash."""

import json
import sys
import zlib
from typing import Any

import jax
import numpy as np

from meshpipe.compiler.digest import digest, digest_of_text
from meshpipe.environment import versions
from meshpipe.layers.layer import Layer
from meshpipe.layers.staged_model import StagedModel
from meshpipe.layers.wiring import Wiring
from meshpipe.mesh import describe
from meshpipe.pipeline.ways import way_between_processes
from meshpipe.processes.agreement import HASH

COMPARED_PACKAGES = ("meshpipe", "jax", "jaxlib", "flax", "optax")
COMPARED_SETTINGS = (
    "jax_enable_x64",
    "jax_default_matmul_precision",
    "jax_default_prng_impl",
    "jax_threefry_partitionable",
    "jax_random_seed_offset",
    "jax_numpy_dtype_promotion",
    "jax_disable_jit",
)
"""Settings of JAX that change what a program computes."""


def describe_model(model: StagedModel) -> dict[str, str]:
    """Describes all stages, also those of other processes, before anything is traced or compiled."""
    plan, installed = model.plan, versions()
    ranks = f"{plan.num_ranks} rank{'s' if plan.num_ranks > 1 else ''}"
    found = {f"version of {name}": installed[name] for name in COMPARED_PACKAGES}
    found["version of python"] = f"{sys.version_info.major}.{sys.version_info.minor}"
    found |= {name: str(getattr(jax.config, name, None)) for name in COMPARED_SETTINGS}
    found |= {
        "mesh": describe(model.mesh),
        "devices": HASH + digest([(device.process_index, device.id) for device in model.mesh.devices.flat]),
        "way to move arrays": way_between_processes(),
        "batch": ", ".join(f"{name} {_shape(shape)}" for name, shape in sorted(model.microbatches.shapes.items())),
        "input": model.task.input,
        "number of layers": str(len(model.layers)),
        "named outputs": ", ".join(f"{name} of layers/{o.layer}" for o, name in model.wiring.names.items()) or "none",
        "what layers read": HASH + digest(_words(model.wiring)),
        "plan": f"{plan.schedule} of {plan.num_stages} stages on {ranks}, {plan.num_microbatches} microbatches",
        "cut into stages": ",".join(str(layers.start) for layers in model.cuts),
        "rematerialisation": ",".join(model.remat or ()),
        "rematerialisation of layers": ",".join(model.layer_remat),
        "sharding rules": HASH + digest(model.rules),
        "trained parameters": HASH + digest([sorted(layer.params) for layer in model.layers]),
        "tied parameters": json.dumps([list(group) for group in model.tied]),
        "instructions": HASH + digest(model.lowered.to_text()),
        "code of the loss": HASH + digest(model.task.loss),
        "code of the metrics": HASH + digest(model.task.metrics),
    }
    for s, (cut, owned) in enumerate(zip(model.cuts, model.parameters, strict=True)):
        shapes = [{path: _shape(leaf) for path, leaf in part.items()} for part in (owned.params, owned.state)]
        found[f"parameters and state of stage {s}"] = HASH + digest(shapes)
        found[f"code of the layers of stage {s}"] = HASH + digest([_code(model.layers[i]) for i in cut])
    return found


def describe_programs(model: StagedModel) -> dict[str, str]:
    """Describes the stages that this process has traced; processes that share a stage compare it."""
    found: dict[str, str] = {}
    texts: dict[int, str] = {}
    for s, stage in model.traced.items():
        graph = model.plan.graph
        for values, boundaries in ((graph.inputs(s), stage.boundaries_in), (graph.outputs(s), stage.boundaries_out)):
            for value, boundary in zip(values, boundaries, strict=True):
                shapes = boundary.on(stage.spec.mesh, stage.microbatch_size)
                crosses = [repr(boundary.treedef), *map(_shape, shapes)]
                plain = f"values from stage {value.source} to {value.targets[0]}"
                found[f"{value.name} from stage {value.source}" if value.name else plain] = HASH + digest(crosses)
        if len({device.process_index for device in stage.spec.mesh.devices.flat}) > 1:
            trace = id(stage.closed)
            if trace not in texts:
                texts[trace] = digest_of_text(f"{stage.closed.jaxpr} {digest(list(stage.closed.consts))}")
            found[f"program of stage {s}"] = HASH + texts[trace]
    return found


def _code(layer: Layer) -> list[Any]:
    """For a ready-made module, its values count too, since every process holds all of them."""
    if layer.values is not None:
        values = {path: _checksum(value) for path, value in layer.values.items()}
        return [layer.graphdef, layer.fields, values]
    return [layer.graphdef, layer.fields, layer.make]


def _words(wiring: Wiring) -> list[str]:
    given = [[(k, str(source)) for k, source in sorted(keywords.items())] for keywords in wiring.keywords]
    return [str(part) for part in (wiring.inputs, given, sorted(wiring.loss.items()), sorted(wiring.metrics.items()))]


def _checksum(value: Any) -> Any:
    if not getattr(value, "is_fully_addressable", True):
        return str(value.dtype), value.shape
    array = np.ascontiguousarray(value)
    return str(array.dtype), array.shape, zlib.crc32(array.reshape(-1).view(np.uint8).data)


def _shape(leaf: jax.ShapeDtypeStruct) -> str:
    spec = getattr(leaf.sharding, "spec", None)
    return f"{leaf.dtype}{list(leaf.shape)}" + ("" if spec is None else f" {tuple(spec)}")
