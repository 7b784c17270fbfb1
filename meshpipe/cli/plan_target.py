"""`meshpipe plan --target`: the programs of a recipe compiled for a machine that need not be here."""

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from meshpipe.phases import phase

if TYPE_CHECKING:
    from meshpipe.config import Config
    from meshpipe.hardware.target_name import TargetName


def plan_for(
    recipe: str, config: "Config", target: "TargetName", plot: Path | None = None, *, as_json: bool = False
) -> None:
    """Compiles every distinct program of a step for the target, and shows memory, times and throughput there.

    Nothing is allocated. Raises `ValueError` when the mesh is larger than the target, or its compiler is not installed.
    """
    target.check_size(config.mesh.num_devices)
    from meshpipe.report.picture import check_picture

    if plot is not None:
        check_picture(plot)
    with phase("Importing JAX"):
        import jax

        from meshpipe.choose.step_prediction import predict_step
        from meshpipe.compiled.compile_for import compile_for
        from meshpipe.compiler.cache import open_cache
        from meshpipe.compiler.compiler import Compiler
        from meshpipe.compiler.topology import check_wheels, devices_of
        from meshpipe.report.memory_picture import draw_memory
        from meshpipe.report.plan import print_layout
        from meshpipe.report.tables import make_console
        from meshpipe.report.target import prediction_values, print_prediction
    from meshpipe.runs.build import check_groups_of, make_chooser

    check_wheels(target)
    jax.config.update("jax_platforms", "cpu")  # what is described comes from its compiler alone
    cache = open_cache(config.compile_cache)
    mesh = config.mesh.build(devices_of(target))
    chooser = replace(make_chooser(config, mesh=mesh), count_because=f"{target.text} is not this machine")
    model = chooser.choose()
    check_groups_of(config, model)
    compiler = Compiler(cache, repr(target.hardware))
    programs = compile_for(model, chooser.transformation, clip_norm=config.optimizer.clip_norm, compiler=compiler)
    tokens = config.model.tokens(chooser.task.batch)
    with phase("Predicting the step"):
        prediction = predict_step(model, chooser.transformation, programs, target.hardware, tokens)
    console = make_console()
    if as_json:
        layout = {"recipe": recipe, "target": target.text, "mesh": dict(mesh.shape)}
        print(json.dumps({**layout, **prediction_values(prediction)}, indent=2))
    else:
        print_layout(console, recipe, model)
        print_prediction(console, str(target), prediction)
        if idle := target.num_devices - mesh.size:
            console.print(f"{idle} of the {target.num_devices} devices are idle: the mesh has {mesh.size}.")
    if plot is not None:
        sizes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
        draw_memory(prediction.ranks, target.hardware.memory_bytes, f"{recipe} on {target.text}\n{sizes}", plot)
        if not as_json:
            console.print(f"\nDrawn in {plot}.")
