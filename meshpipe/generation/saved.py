"""A model in a folder, trained here or published: what it is, and how its weights come onto the submeshes of a mesh."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from meshpipe.adapters.config import LoraConfig
from meshpipe.checkpoint import CheckpointConfig, CheckpointError, list_checkpoints
from meshpipe.checkpoint.inspection import reader_of
from meshpipe.config import Config
from meshpipe.data import TextFilesConfig
from meshpipe.files import expanded
from meshpipe.generation.generator import Generator
from meshpipe.generation.staged_weights import ReadWeights
from meshpipe.generation.tokenizer import TextTokenizer, end_tokens, find_tokenizer
from meshpipe.layers.initialise import initialise
from meshpipe.layers.staged_model import StagedModel
from meshpipe.models.model import ModelConfig
from meshpipe.processes.coordination import process_count
from meshpipe.processes.group import Group
from meshpipe.runs.find_start import check_same_weights, find_start
from meshpipe.runs.saved_base import check_digest
from meshpipe.runs.saved_model import saved_lora, saved_model
from meshpipe.runs.start import Start
from meshpipe.training.base import digest_of_leaves
from meshpipe.training.state import StateTree
from meshpipe.weights import WeightsFolder
from meshpipe.weights.companions import PRETRAINED
from meshpipe.weights.model_of import MODELS, saved_model_of


@dataclass(frozen=True, kw_only=True)
class Saved:
    """A model in a folder. Nothing of its weights has been read yet."""

    name: str
    """Where it is, in words."""
    folder: Path
    model: ModelConfig
    lora: LoraConfig
    read: ReadWeights
    """Reads the leaves of the local stages onto their submeshes. Raises `ValueError` when they are those of another
    model, or damaged."""
    tokenizer: TextTokenizer | None
    """What its tokens are; None where nothing tells."""
    ends: tuple[int, ...]
    """The tokens that end a text."""
    metadata: Mapping[str, Any] | None = None
    """What the checkpoint says of its run; None for published weights."""

    def generator(self, mesh: Mesh, **arguments: Any) -> Generator:
        """Reads the weights onto a mesh; `arguments` are further ones of `Generator`."""
        tokenizer = self.tokenizer
        return Generator(self.model, self.read, mesh=mesh, tokenizer=tokenizer, lora=self.lora, **arguments)


def open_saved(folder: str | Path, step: int | None = None, tokenizer: str | Path | None = None) -> Saved:
    """The model of a checkpoint, of which `step` None takes the newest, or of a folder of published weights.
    `tokenizer` is a file or folder of a tokenizer, in place of what the folder tells.

    For a model that is none of meshpipe's own, it runs the recipe's Python file, which the checkpoint names: use that
    only with checkpoints that you trust. Raises `ValueError` when the folder holds neither, or its model cannot be made
    as it was.
    """
    folder = expanded("folder", folder)
    if not reader_of(folder).steps():
        if (folder / "config.json").is_file():
            return _published(folder, step, tokenizer)
        raise CheckpointError(
            "A model is in a folder of checkpoints, such as the --run-dir of a run, or of published weights, with "
            f"config.json and files of safetensors. Got {str(folder)!r}, which has neither."
        )
    return _checkpoint(folder, step, tokenizer)


def _published(folder: Path, step: int | None, tokenizer: str | Path | None) -> Saved:
    if step is not None:
        raise CheckpointError(f"Published weights have no steps. Got step {step} for {folder}. Leave it out.")
    weights = WeightsFolder(folder)
    check_same_weights(weights, "weights")

    def read(model: StagedModel) -> list[StateTree]:
        weights.check({path: leaf for stage in model.parameters for path, leaf in stage.all_params.items()})
        wanted = {path: leaf for s in model.local for path, leaf in model.parameters[s].all_params.items()}
        values = weights.read(wanted)
        local = [stage.all_params if s in model.local else {} for s, stage in enumerate(model.parameters)]
        return [{"params": {path: values[path] for path in owned}} for owned in local]

    return Saved(
        name=f"the weights of {folder}",
        folder=folder,
        model=weights.model,
        lora=LoraConfig(),
        read=read,
        tokenizer=find_tokenizer(weights.model, tokenizer, [folder]),
        ends=end_tokens(folder),
    )


def _checkpoint(folder: Path, step: int | None, tokenizer: str | Path | None) -> Saved:
    reader = reader_of(folder)
    step = list_checkpoints(reader.directory)[-1] if step is None else step
    metadata = reader.metadata(step)
    config = metadata.get("config")
    parts = config if isinstance(config, dict) else {}
    kind = parts["model"].get("type") if isinstance(parts.get("model"), dict) else None
    own = kind in MODELS
    model = saved_model_of(metadata, reader.directory) if own else saved_model(metadata, reader.directory, "recipe")
    lora, seed = saved_lora(metadata, reader.directory), metadata.get("seed")
    asked = Config(
        model=model,
        data=TextFilesConfig(),  # weights are read without data
        lora=lora,
        seed=seed if isinstance(seed, int) and 0 <= seed < 2**32 else 0,
        checkpoint=CheckpointConfig(init_from=str(reader.directory), init_step=step),
    )
    start = find_start(asked)
    assert start is not None
    places = [reader.directory / PRETRAINED, *_prepared(parts.get("data"))]
    return Saved(
        name=f"step {step} of {reader.directory}",
        folder=reader.directory,
        model=model,
        lora=lora,
        read=lambda model: _read(start, model, asked.seed),
        tokenizer=find_tokenizer(model, tokenizer, places),
        ends=end_tokens(reader.directory / PRETRAINED),
        metadata=metadata,
    )


def _prepared(data: Any) -> list[Path]:
    """Where the tokenizer of prepared data is: in the folder that a run was trained on, or in the first of several."""
    if not isinstance(data, dict):
        return []
    mixture = data.get("mixture")
    first = mixture[0][0] if isinstance(mixture, list) and mixture and isinstance(mixture[0], list) else None
    names = [name for name in (data.get("path"), first) if isinstance(name, str)]
    return [Path(os.path.expanduser(name)) / "tokenizer" for name in names]


def _read(start: Start, model: StagedModel, seed: int) -> list[StateTree]:
    """The leaves of the local stages. What a run had drawn from its seed, and did not train or save, is drawn again."""
    start.check(model)
    shapes = [{"params": stage.all_params, "state": stage.own_state} for stage in model.parameters]
    trees = [dict(tree) for tree in start.read(shapes).trees]
    held = frozenset(path for tree in trees for part in tree.values() for path in part)
    lacking = [
        (s, model.layers[i])
        for s in model.local
        for i in model.cuts[s]
        if not held.issuperset((*model.layers[i].params, *model.layers[i].state))
    ]
    if lacking:
        layers = [(layer, model.parameters[s].mesh) for s, layer in lacking]
        made = initialise(layers, model.rules, seed, model.target, skip=held)
        for (s, _), leaves in zip(lacking, made, strict=True):
            trees[s]["params"] = {**trees[s].get("params", {}), **leaves[0], **leaves[1]}
    if start.left_out_base is not None and start.base is None:
        frozen = {path for stage in model.parameters for path in stage.frozen}
        drawn: dict[str, jax.Array] = {p: v for tree in trees for p, v in tree.get("params", {}).items() if p in frozen}
        digest = digest_of_leaves(drawn, Group(range(process_count())))
        check_digest(start.left_out_base, digest, f"the first values of seed {seed}, as they are drawn here,")
    return trees
