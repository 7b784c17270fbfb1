"""The memory that `meshpipe advise` estimates without compiling, against that of the compiled programs.

    python tests/benchmarks/estimated_memory.py [--json FILE]

Several models in several layouts, on virtual CPU devices; nothing is run. Below 1, an estimate would say that a layout
fits which does not.
"""

import argparse
from collections.abc import Mapping
from dataclasses import replace

import jax
from benchmark import print_results

import meshpipe
from meshpipe.advise.confirm import compile_best
from meshpipe.advise.estimate import Estimator
from meshpipe.advise.layout import Layout
from meshpipe.advise.survey import survey
from meshpipe.advise.times import Roofline
from meshpipe.config import Config
from meshpipe.hardware.catalogue import find_hardware
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json")
    flags = parser.parse_args()
    meshpipe.use_cpu_devices(2)
    rows = [row for recipe in RECIPES for row in _rows(recipe, replace(find(recipe).config(), batch_size=BATCH))]
    print_results("memory: estimated against compiled", rows, flags.json)


def _rows(recipe: str, config: Config) -> list[dict[str, object]]:
    hardware = find_hardware("h100")
    work = survey(config, jax.devices())
    estimator = Estimator(work, Roofline(work, hardware), hardware, BATCH)
    found = []
    for name, layout in LAYOUTS.items():
        estimate = estimator.estimate(layout)
        (compiled,) = compile_best([[estimate]], config, jax.devices()[: layout.num_devices], hardware, float("inf"))
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
