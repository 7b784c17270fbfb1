"""The memory that `meshpipe advise` estimates without compiling, against that of the compiled programs.

    python tests/benchmarks/estimated_memory.py [--target gpu:h100:8] [--json FILE]

Several models in several layouts, on virtual CPU devices; nothing is run. With `--target`, blocks of Llama 2 7B on 8
devices that need not be here. Below 1, an estimate would say that a layout fits which does not.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
from benchmark import print_results

import meshpipe
from meshpipe.advise.confirm import compile_best
from meshpipe.advise.estimate import Estimator
from meshpipe.advise.layout import Layout
from meshpipe.advise.survey import survey
from meshpipe.advise.times import Roofline
from meshpipe.compiler.topology import devices_of
from meshpipe.config import Config
from meshpipe.hardware.catalogue import find_hardware
from meshpipe.hardware.hardware import Hardware
from meshpipe.hardware.target_name import parse_target
from meshpipe.machine import format_bytes
from meshpipe.runs.recipe import find

BATCH = 32
RECIPES = ("language_model:single", "text_classifier:single", "encoder_decoder:single", "resnet:single")
LAYOUTS: Mapping[str, Layout] = {
    "one device": Layout(num_microbatches=2),
    "one device, layer": Layout(num_microbatches=2, remat="layer"),
    "pipeline 2, 1f1b": Layout(pipeline=2, num_microbatches=4),
    "pipeline 2, 1f1b, full": Layout(pipeline=2, num_microbatches=4, remat="full"),
    "pipeline 2, zb-h1": Layout(pipeline=2, schedule="zb-h1", num_microbatches=4),
}

BLOCKS = 8
ON_TARGET: Mapping[str, Layout] = {
    "pipeline 4, tensor 2, layer": Layout(pipeline=4, tensor=2, num_microbatches=32, remat="layer"),
    "pipeline 4, data 2, 1f1b": Layout(pipeline=4, data=2, num_microbatches=16),
    "pipeline 4, data 2, zb-h1": Layout(pipeline=4, data=2, schedule="zb-h1", num_microbatches=16),
    "pipeline 2, fully sharded 4, dualpipe-v": Layout(
        pipeline=2, data=4, sharding="fully-sharded", schedule="dualpipe-v", stages_per_rank=2, num_microbatches=8
    ),
    "fully sharded 8": Layout(data=8, sharding="fully-sharded", num_microbatches=4),
    "fully sharded 8, layer": Layout(data=8, sharding="fully-sharded", num_microbatches=1, remat="layer"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", help="devices that need not be here")
    parser.add_argument("--json")
    flags = parser.parse_args()
    if flags.target:
        jax.config.update("jax_platforms", "cpu")
    meshpipe.use_cpu_devices(2)
    if flags.target:
        target = parse_target(flags.target)
        config = find("language_model:llama_7b").config()
        config = replace(config, model=replace(config.model, num_blocks=BLOCKS))  # type: ignore[call-arg]
        rows = _rows(f"{BLOCKS} blocks", config, ON_TARGET, devices_of(target), target.hardware)
    else:
        hardware = find_hardware("h100")
        configs = {recipe: replace(find(recipe).config(), batch_size=BATCH) for recipe in RECIPES}
        rows = [row for item in configs.items() for row in _rows(*item, LAYOUTS, jax.devices(), hardware)]
    print_results(f"memory: estimated against compiled, {flags.target or 'CPU'}", rows, flags.json)


def _rows(
    recipe: str, config: Config, layouts: Mapping[str, Layout], devices: Sequence[Any], hardware: Hardware
) -> list[dict[str, object]]:
    work = survey(config, devices)
    estimator = Estimator(work, Roofline(work, hardware), hardware, config.batch_size)
    found = []
    for name, layout in layouts.items():
        estimate = estimator.estimate(layout)
        (compiled,) = compile_best([[estimate]], config, devices[: layout.num_devices], hardware, float("inf"))
        memory = compiled.estimate.memory
        found.append(
            {
                "recipe": recipe,
                "layout": name,
                "estimated": format_bytes(estimate.memory),
                "of it temporaries": format_bytes(estimate.memory_parts["temporaries"]),
                "compiled": format_bytes(memory),
                "estimated/compiled": estimate.memory / memory,
            }
        )
    return found


if __name__ == "__main__":
    main()
