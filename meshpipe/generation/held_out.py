"""Evaluates a model in a folder on held-out data: loss, perplexity and the metrics of the model."""

import contextlib
import itertools
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from meshpipe.adapters.lora import with_lora
from meshpipe.compiler.cache import open_cache
from meshpipe.data import Batch, Source, TextFilesConfig, batches, check_limits, check_source, example_batch
from meshpipe.errors import ArgumentError
from meshpipe.generation.memory import check_activations
from meshpipe.generation.saved import Saved
from meshpipe.generation.staged_weights import StagedWeights
from meshpipe.generation.tokenizer import ByteTokenizer
from meshpipe.layers.task import Task
from meshpipe.mesh import DATA
from meshpipe.phases import phase
from meshpipe.processes.agreement import agree
from meshpipe.processes.group import Group
from meshpipe.runs.recipe import find
from meshpipe.runs.saved_model import saved_data
from meshpipe.sharding import ShardingRules
from meshpipe.training.evaluation import evaluate

LARGEST_EXPONENT = 700.0
"""The perplexity of a loss above this is more than any float."""


def held_out_source(saved: Saved, data: Path | None, sequence_length: int) -> Source:
    """The examples to evaluate on: a prepared folder, a text file or folder read byte by byte, in windows of
    `sequence_length`, or by default the held-out data of the run that saved the model.

    The last runs the recipe's Python file, which the checkpoint names. Raises `ValueError` when there is no such data,
    or it is not for this model.
    """
    if data is None:
        source = _of_the_run(saved)
    elif (data / "prepared.json").is_file():
        from meshpipe.data import PreparedConfig

        source = PreparedConfig(path=str(data)).eval_source()
    elif not isinstance(saved.tokenizer, ByteTokenizer):
        raise ArgumentError(
            f"`data` must be a folder that `meshpipe data prepare` has made. Got {data} for a model whose tokens are "
            "not bytes."
        )
    else:
        source = TextFilesConfig(path=str(data), sequence_length=sequence_length).eval_source()
    check_limits(check_source(source), saved.model.limits())
    return source


def tokens_of_others(saved: Saved, data: Path | None) -> str:
    """A sentence about a prepared folder whose tokens are not those of the model; empty where nothing tells."""
    file = getattr(saved.tokenizer, "file", None)
    if data is None or file is None or not (data / "prepared.json").is_file():
        return ""
    from meshpipe.data import PreparedConfig
    from meshpipe.data.same_tokenizer import other_tokenizer

    return other_tokenizer(PreparedConfig(path=str(data)), Path(file).parent)


def beyond_positions(saved: Saved, source: Source) -> str:
    """A sentence about windows that are longer than the texts that the model is for; empty where they are not."""
    return saved.beyond(np.size(source[0][saved.model.input]))


def _of_the_run(saved: Saved) -> Source:
    recipe = None if saved.metadata is None else saved.metadata.get("recipe")
    if saved.metadata is None or not isinstance(recipe, str) or ":" not in recipe:
        raise ArgumentError(
            f"Evaluation needs held-out data. Got none, and no recipe goes with {saved.name}. Pass `data` FOLDER."
        )
    return saved_data(find(recipe).config().data, saved.metadata).eval_source()


def evaluate_saved(
    saved: Saved,
    source: Source,
    mesh: Mesh,
    *,
    batch_size: int,
    num_microbatches: int = 1,
    num_batches: int = 0,
    compile_cache: str | None = None,
) -> dict[str, float]:
    """Means over the examples of a source, in its order: `loss` (in nats), `perplexity`, and the metrics of the model;
    the same in all processes.

    Arguments:
        saved: The model.
        source: The examples.
        mesh: The devices, with one stage for each rank.
        batch_size: Examples that are put on the devices at a time; the last batch may be smaller.
        num_microbatches: Parts of a batch, which follow each other through the ranks.
        num_batches: Evaluates so many batches; 0 all.
        compile_cache: A folder that keeps compiled programs for later; None keeps none.

    Raises `ValueError` when source, model and mesh do not fit together.
    """
    parts = num_microbatches * mesh.shape.get(DATA, 1)
    if batch_size % parts:
        raise ArgumentError(
            f"`batch_size` must be a multiple of `num_microbatches` * `mesh.data`. Got {batch_size} with {parts}."
        )
    batch_size = min(batch_size, -(-len(source) // parts) * parts)
    task = _task(saved, source, batch_size)
    group = Group(device.process_index for device in mesh.devices.flat)
    if not group.is_alone:
        said = {"data": source, "model": saved.model, "batch size": batch_size, "microbatches": num_microbatches}
        said |= {"batches": num_batches, "mesh": dict(mesh.shape)}
        agree(group, "evaluation", {name: str(value) for name, value in said.items()})
    with phase(f"Reading {saved.name}"):
        weights = StagedWeights.of(task, mesh, saved.read, num_microbatches)
    model = weights.model
    model.name, model.cache = group.name, open_cache(compile_cache)
    check_activations(
        model.evaluation.programs,
        mesh,
        at_once=num_microbatches,
        what=f"a batch of {batch_size} examples",
        way_out="Lower `batch_size`, or raise `num_microbatches`.",
    )
    with _counted(source, batch_size, num_batches) as counted:
        return _with_perplexity(evaluate(model, weights, counted, model.place_seed(0), group))


@contextlib.contextmanager
def _counted(source: Source, batch_size: int, num_batches: int) -> Iterator[Iterator[Batch]]:
    """So many batches of a source in its order, all with 0; says which one is evaluated."""
    in_order = batches(source, batch_size, shuffle=False, epochs=1, drop_remainder=False)
    count = -(-len(source) // batch_size)
    wanted = min(count, num_batches) if num_batches else count
    with contextlib.closing(in_order), phase("Evaluating", "batch", wanted) as evaluating:

        def counted() -> Iterator[Batch]:
            for batch in itertools.islice(in_order, wanted):
                evaluating.next()
                yield batch

        yield counted()


def _task(saved: Saved, source: Source, batch_size: int) -> Task:
    return Task(
        with_lora(saved.model.layers(), saved.lora),
        saved.model.loss,
        batch=example_batch(source, batch_size),
        input=saved.model.input,
        metrics=saved.model.metrics,
        tied=saved.model.tied(),
        rules=ShardingRules(),
    )


def _with_perplexity(found: Mapping[str, float]) -> dict[str, Any]:
    """The exponential of the loss follows it."""
    loss = found["loss"]
    perplexity = math.exp(loss) if loss < LARGEST_EXPONENT else math.inf
    return {"loss": loss, "perplexity": perplexity, **{name: v for name, v in found.items() if name != "loss"}}
