"""How well generation keeps the ranks of a pipeline at work, and what a token costs beside `transformers` on CPU.

    python tests/benchmarks/generation.py [--transformers PYTHON]

The first table needs g++: stages that sleep show the timeline that devices would have. The second continues texts of
very different lengths: all together, where the row of a text that has ended is given to the next prompt; and as many at
a time as there are rows, where rows wait for the longest text. The third starts PYTHON, of an environment with torch
and transformers, to make a random model, and to continue the same prompt with it on the same cores. The status is 1
when a pipeline with as many requests as ranks reaches less than 0.8 times the ideal, or the tokens differ.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from benchmark import median
from flax import nnx
from sleeping_layer import WIDTH, SleepingLayer, register

import meshpipe
from meshpipe.generation.saved import open_saved
from meshpipe.layers.layer import LayerLike
from meshpipe.models import LanguageModelConfig

SECONDS, TOKENS, VOCAB = 0.01, 24, 8
PROMPT_LENGTH, NEW_TOKENS, REPEATS = 32, 64, 5
LEAST = 0.8
ROWS = 8
PROMPT_LENGTHS, TEXT_LENGTHS = (4, 8, 12, 30, 60, 120, 250), (2, 4, 8, 16, 32, 64, 128)
THEIRS = """
import json, sys, time, torch
from transformers import LlamaConfig, LlamaForCausalLM
folder, prompt, count, repeats = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
torch.manual_seed(0)
config = LlamaConfig(hidden_size=512, intermediate_size=1536, num_hidden_layers=8, num_attention_heads=8,
                     num_key_value_heads=4, vocab_size=8192, max_position_embeddings=512, eos_token_id=None,
                     bos_token_id=None, initializer_range=0.1)
model = LlamaForCausalLM(config).eval()
model.save_pretrained(folder)
ids = torch.tensor([prompt])
seconds = []
with torch.no_grad():
    for _ in range(repeats + 1):
        began = time.perf_counter()
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False,
                             pad_token_id=0)
        seconds.append(time.perf_counter() - began)
print(json.dumps({"seconds": seconds[1:], "tokens": out[0, len(prompt):].tolist(), "threads": torch.get_num_threads()}))
"""


@dataclass(frozen=True, kw_only=True)
class SleepingModel(meshpipe.ModelConfig):
    """A language model whose blocks sleep."""

    input = "inputs"
    blocks: int = 4

    def layers(self) -> list[LayerLike]:
        embedding = partial(nnx.Embed, VOCAB, WIDTH)
        head = partial(nnx.Linear, WIDTH, VOCAB)
        return [embedding, *(partial(SleepingLayer, (SECONDS,) * 3) for _ in range(self.blocks)), head]

    def loss(self, output: Any, batch: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return output.sum(), jnp.float32(output.size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--transformers", metavar="PYTHON", help="Python of an environment with torch and transformers")
    flags = parser.parse_args()
    meshpipe.use_cpu_devices(4)
    register()
    gains = [pipelined(ranks) for ranks in (2, 4)]
    good = all([*gains, uneven(1), uneven(2)])
    if flags.transformers is not None:
        good = beside_transformers(flags.transformers) and good
    sys.exit(0 if good else 1)


def pipelined(ranks: int) -> bool:
    """Whether as many requests as ranks reach nearly as many times the tokens of one."""
    model = SleepingModel(blocks=ranks)
    weights = {
        f"layers/{i}/{path}": value
        for i, layer in enumerate(model.layers())
        for path, value in _leaves(layer(rngs=nnx.Rngs(i)) if i in (0, ranks + 1) else layer()).items()
    }
    rates = {}
    for requests in (1, ranks):
        mesh = meshpipe.make_mesh(ranks)
        generator = meshpipe.Generator(model, weights, mesh=mesh, batch_size=1, in_flight=requests)
        prompts = [[1, 2]] * requests
        generator.tokens(prompts, max_tokens=2)  # compiles
        seconds = []
        for _ in range(3):
            began = time.perf_counter()
            generator.tokens(prompts, max_tokens=TOKENS)
            seconds.append(time.perf_counter() - began)
        rates[requests] = requests * TOKENS / median(seconds)
    gain, ideal = rates[ranks] / rates[1], 1 / (ranks * SECONDS)
    print(
        f"{ranks} ranks: one request {rates[1]:.1f} tokens/s (at most {ideal:.1f}), {ranks} in flight "
        f"{rates[ranks]:.1f} tokens/s: {gain:.2f} times, {gain / ranks:.0%} of the ideal"
    )
    return gain >= LEAST * ranks


def uneven(ranks: int) -> bool:
    """Whether texts of very different lengths get the same tokens together and some at a time; prints both speeds."""
    model = LanguageModelConfig(d_model=256, num_blocks=4, num_heads=4, num_kv_heads=4, d_hidden=768, vocab_size=512)
    with nnx.use_eager_sharding(False):
        weights = {
            f"layers/{i}/{path}": value
            for i, layer in enumerate(model.layers())
            for path, value in _leaves(layer(rngs=nnx.Rngs(i))).items()
        }
    drawn = random.Random(0)
    prompts = [[drawn.randrange(512) for _ in range(drawn.choice(PROMPT_LENGTHS))] for _ in range(48)]
    generator = meshpipe.Generator(model, weights, mesh=meshpipe.make_mesh(ranks), batch_size=ROWS)
    longest = generator.tokens(prompts, max_tokens=max(TEXT_LENGTHS))
    ends = {tuple(row[: drawn.choice(TEXT_LENGTHS)]) for row in longest}

    def together() -> list[list[int]]:
        return generator.tokens(prompts, max_tokens=max(TEXT_LENGTHS), stop_when=lambda text: tuple(text) in ends)

    def in_turn() -> list[list[int]]:
        ordered, found, rows = sorted(range(len(prompts)), key=lambda n: len(prompts[n])), {}, ROWS * ranks
        for at in range(0, len(ordered), rows):
            some = ordered[at : at + rows]
            texts = generator.tokens(
                [prompts[n] for n in some], max_tokens=max(TEXT_LENGTHS), stop_when=lambda text: tuple(text) in ends
            )
            found.update(zip(some, texts, strict=True))
        return [found[n] for n in range(len(prompts))]

    same, rates = together() == in_turn(), []  # compiles
    for run in (together, in_turn):
        seconds = []
        for _ in range(3):
            began = time.perf_counter()
            count = sum(map(len, run()))
            seconds.append(time.perf_counter() - began)
        rates.append(count / median(seconds))
    print(
        f"{ranks} ranks, {len(prompts)} texts of {min(TEXT_LENGTHS)} to {max(TEXT_LENGTHS)} tokens: {rates[0]:.0f} "
        f"tokens/s, {ROWS * ranks} at a time {rates[1]:.0f} tokens/s: {rates[0] / rates[1]:.2f} times; "
        f"{'the same tokens' if same else 'OTHER TOKENS'}"
    )
    return same


def _leaves(module: nnx.Module) -> dict[str, Any]:
    return {"/".join(map(str, key)): v.get_value() for key, v in nnx.to_flat_state(nnx.state(module, nnx.Param))}


def beside_transformers(python: str) -> bool:
    """Whether both write the same tokens; prints the time of a token of each."""
    prompt = [(7 * i + 3) % 8192 for i in range(PROMPT_LENGTH)]
    with tempfile.TemporaryDirectory() as folder:
        command = [python, "-c", THEIRS, folder, json.dumps(prompt), str(NEW_TOKENS), str(REPEATS)]
        theirs = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
        generator = open_saved(Path(folder)).generator(meshpipe.make_mesh(1))
    seconds = []
    for _ in range(REPEATS + 1):
        began = time.perf_counter()
        (tokens,) = generator.tokens([prompt], max_tokens=NEW_TOKENS)
        seconds.append(time.perf_counter() - began)
    ours, other = (1e3 * median(times) / NEW_TOKENS for times in (seconds[1:], theirs["seconds"]))
    same = tokens == theirs["tokens"]
    print(
        f"31 million parameters, float32, {PROMPT_LENGTH} + {NEW_TOKENS} tokens, one text: meshpipe {ours:.2f} ms a "
        f"token, transformers {other:.2f} ms ({theirs['threads']} threads): {ours / other:.2f} times; "
        f"{'the same tokens' if same else 'OTHER TOKENS'}"
    )
    return same


if __name__ == "__main__":
    main()
