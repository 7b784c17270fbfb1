"""Published comparisons of layouts, estimated from public numbers as `meshpipe advise` does.

    python tests/benchmarks/verdicts.py [--json FILE]

1. torchtitan, Llama 3.1 405B on 512 H100 (8 pipeline x 8 fully sharded x 8 tensor, batch 256 of 8192 tokens, all layers
   recomputed, FP8): tokens/s/GPU with 1F1B and interleaved 1F1B. benchmarks/llama3_h100_202412_torchtitan.md of
   pytorch/torchtitan; the number of microbatches is not given: 8, one for each rank, for both.
2. marin, a mixture of experts of 67 billion parameters, 2 of them active, on 64 H100 (8 pipeline x 8 experts, 32
   microbatches) against fully sharded parameters; marin-community/marin, issue 7024.
3. marin, a mixture of experts of 1.76 billion parameters on v6e-8 (2 stages x 2 data x 2 experts) against fully sharded
   parameters; issue 6532.

Mixtures of experts are stood for by layers with the parameters of all experts and the products of the active ones;
experts split like a tensor axis, and their all-to-all is left out, on both sides.
"""

import argparse

import jax
from benchmark import print_results

import meshpipe
from meshpipe.advise.estimate import Estimator
from meshpipe.advise.layout import Layout
from meshpipe.advise.survey import survey
from meshpipe.advise.times import Roofline
from meshpipe.advise.work import Amount, Kept, LayerWork, ModelWork, ParameterWork, ProgramWork
from meshpipe.config import Config
from meshpipe.data import TextFilesConfig
from meshpipe.hardware.catalogue import find_hardware
from meshpipe.models import LanguageModelConfig
from meshpipe.models.attention import cpu_devices_stand_in
from meshpipe.plan.plan import Op
from meshpipe.stage.target import ACCELERATOR


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json")
    flags = parser.parse_args()
    meshpipe.use_cpu_devices(2)
    rows = [llama_405b(), mixture_on_h100(), mixture_on_v6e()]
    print_results("verdicts: how many times as fast the first is as the second", rows, flags.json)


def llama_405b() -> dict[str, object]:
    model = LanguageModelConfig(
        d_model=16384,
        num_blocks=126,
        num_heads=128,
        num_kv_heads=8,
        d_hidden=53248,
        vocab_size=128256,
        dtype="bfloat16",
    )
    config = Config(model=model, data=TextFilesConfig(sequence_length=8192), batch_size=256)
    with cpu_devices_stand_in():
        work = survey(config, jax.devices(), ACCELERATOR)
    hardware = find_hardware("h100")
    estimator = Estimator(work, Roofline(work, hardware), hardware, config.batch_size)
    both = [
        Layout(
            pipeline=8,
            data=8,
            tensor=8,
            sharding="fully-sharded",
            schedule=schedule,
            stages_per_rank=stages,
            num_microbatches=8,
            remat="layer",
        )
        for schedule, stages in (("interleaved-1f1b", 2), ("1f1b", 1))
    ]
    speeds = [256 * 8192 / 512 / estimator.estimate(layout).seconds for layout in both]
    what = "405B on 512 H100: interleaved 1F1B against 1F1B, tokens/s/GPU"
    return _row(what, speeds, 128 / 100)


def mixture_on_h100() -> dict[str, object]:
    work = mixture(parameters=67e9, active=2e9, layers=24, width=2048, tokens=8192)
    pipeline = Layout(pipeline=8, tensor=8, schedule="dualpipe-v", stages_per_rank=2, num_microbatches=32, remat="full")
    sharded = Layout(data=64, sharding="fully-sharded", num_microbatches=4, remat="layer")
    return _row(
        "67B-A2B on 64 H100: pipeline against fully sharded, tokens/s",
        [_speed(work, "h100", 256, layout) for layout in (pipeline, sharded)],
        2.2,
    )


def mixture_on_v6e() -> dict[str, object]:
    work = mixture(parameters=1.76e9, active=0.4e9, layers=12, width=1024, tokens=4096)
    pipeline = Layout(pipeline=2, data=2, tensor=2, schedule="gpipe", num_microbatches=4, remat="full")
    sharded = Layout(data=8, sharding="fully-sharded")
    return _row(
        "1.76B on v6e-8: fully sharded against GPipe, tokens/s",
        [_speed(work, "v6e", 64, layout) for layout in (sharded, pipeline)],
        1 / 0.78,
    )


def mixture(*, parameters: float, active: float, layers: int, width: int, tokens: int) -> ModelWork:
    """Layers of a mixture of experts in bfloat16."""
    nbytes, products = 2 * parameters / layers, 2 * active / layers * tokens
    activation = 2.0 * tokens * width

    def program(times: float) -> ProgramWork:
        return ProgramWork({"bfloat16": Amount(0.0, times * products)}, Amount(times * nbytes, times * 10 * activation))

    layer = LayerWork(
        kind="Mixture",
        programs={
            "none": {
                Op.FORWARD: program(1),
                Op.BACKWARD: program(2),
                Op.BACKWARD_INPUT: program(1),
                Op.BACKWARD_WEIGHT: program(1),
            }
        },
        parameters=(ParameterWork("experts", (layers, layers), int(nbytes), over_tensor=0, over_data=1),),
        kept={"none": Kept(10 * activation, 0.0, 2 * activation)},
        output=activation,
        gradient_bytes=2.0,
        optimizer_bytes=4.0,
        prepared=0.0,
    )
    return ModelWork(layers=(layer,) * layers, batch_bytes=4.0 * tokens, tokens=tokens, runs_layers_apart=True)


def _speed(work: ModelWork, hardware_name: str, batch: int, layout: Layout) -> float:
    hardware = find_hardware(hardware_name)
    seconds = Estimator(work, Roofline(work, hardware), hardware, batch).estimate(layout).seconds
    assert work.tokens is not None
    return batch * work.tokens / seconds


def _row(what: str, speeds: list[float], published: float) -> dict[str, object]:
    ratio = speeds[0] / speeds[1]
    return {
        "what": what,
        "first": speeds[0],
        "second": speeds[1],
        "estimated": ratio,
        "published": published,
        "off": f"{ratio / published - 1:+.0%}",
    }


if __name__ == "__main__":
    main()
