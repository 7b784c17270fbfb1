"""A model in a folder, trained here or published: what it is, and how its weights come onto the submeshes of a mesh."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import jax
from jax.sharding import Mesh

from meshpipe.adapters.config import LoraConfig
from meshpipe.checkpoint import CheckpointConfig, CheckpointError, list_checkpoints
from meshpipe.checkpoint.base import base_of
from meshpipe.checkpoint.inspection import reader_of
from meshpipe.config import Config
from meshpipe.data import TextFilesConfig
from meshpipe.errors import ArgumentError
from meshpipe.files import expanded
from meshpipe.generation.generator import Generator
from meshpipe.generation.tokenizer import TextTokenizer, find_tokenizer
from meshpipe.layers.initialise import initialise
from meshpipe.layers.staged_model import StagedModel
from meshpipe.models.model import ModelConfig
from meshpipe.processes.coordination import process_count
from meshpipe.processes.group import Group
from meshpipe.runs.find_start import check_same_weights, find_start, saved_param_dtype
from meshpipe.runs.saved_base import check_digest
from meshpipe.runs.saved_model import saved_lora, saved_model
from meshpipe.runs.start import Start
from meshpipe.training.base import digest_of_leaves
from meshpipe.training.state import StateTree
from meshpipe.weights import WeightsFolder, is_published
from meshpipe.weights.companions import PRETRAINED, companions_of
from meshpipe.weights.generation_settings import GenerationSettings
from meshpipe.weights.model_of import MODELS, saved_model_of
from meshpipe.weights.positions import longest_text

DtypeName = Literal["float32", "bfloat16"]


@runtime_checkable
class ReadSaved(Protocol):
    """Reads the leaves of the local stages onto their submeshes. Raises `ValueError` when they are those of another
    model, or damaged.
    """

    def __call__(self, model: StagedModel, converts: bool = False) -> Sequence[StateTree]:
        """`converts` says whether weights saved in float32 may be read into a model that keeps them in bfloat16."""


@dataclass(frozen=True, kw_only=True)
class Saved:
    """A model in a folder. Nothing of its weights has been read yet."""

    name: str
    """Where it is, in words."""
    folder: Path
    model: ModelConfig
    lora: LoraConfig
    read: ReadSaved
    tokenizer: TextTokenizer | None
    """What its tokens are; None where nothing tells."""
    generation: GenerationSettings = field(default_factory=GenerationSettings)
    """What its folder says of generating."""
    longest_text: int | None = None
    """The most positions that published weights are for; None where nothing tells."""
    note: str = ""
    """What is lost of the weights, as a sentence."""
    metadata: Mapping[str, Any] | None = None
    """What the checkpoint says of its run; None for published weights."""

    @property
    def ends(self) -> tuple[int, ...]:
        """The tokens that end a text, by the folder and by the tokenizer. Raises `ValueError` where either names one
        that is none.
        """
        end = None if self.tokenizer is None else self.tokenizer.end
        return tuple(dict.fromkeys([*self.generation.ends, *([] if end is None else [end])]))

    def beyond(self, length: int) -> str:
        """A sentence about texts of up to so many tokens, where the model is for shorter ones; else empty."""
        if self.longest_text is None or length <= self.longest_text:
            return ""
        return (
            f"The model is for texts of at most {self.longest_text:,} tokens (max_position_embeddings of its "
            f"config.json), and these have up to {length:,}: expect worse results beyond."
        )

    def generator(self, mesh: Mesh, *, weights_dtype: str = "float32", **arguments: Any) -> Generator:
        """Reads the weights onto a mesh; `arguments` are further ones of `Generator`, among which `ends` are by default
        those of the folder. Raises `ValueError` as `ends` does, and for another `weights_dtype` than the run's below
        adapters whose base is compared with what the run had.
        """
        if "ends" not in arguments:
            arguments["ends"] = self.ends
        converts = weights_dtype != "float32"
        if converts and self.metadata is not None and base_of(self.metadata) is not None:
            raise _kept_as_it_was("weights_dtype", weights_dtype, self.folder, self.metadata)
        return Generator(
            self.model,
            partial(self.read, converts=converts),
            mesh=mesh,
            tokenizer=self.tokenizer,
            lora=self.lora,
            weights_dtype=weights_dtype,
            **arguments,
        )


def open_saved(
    folder: str | Path,
    step: int | None = None,
    tokenizer: str | Path | None = None,
    *,
    dtype: DtypeName | None = None,
    param_dtype: DtypeName | None = None,
    base: str | Path | None = None,
) -> Saved:
    """The model of a checkpoint, of a folder of published weights, or of adapters of PEFT and the weights below them.

    Arguments:
        folder: The folder.
        step: Of a checkpoint; None takes the newest.
        tokenizer: File or folder of a tokenizer, in place of what the folder tells.
        dtype: How the model is computed; None is as the run computed it, and float32 for published weights.
        param_dtype: What weights are kept in; None is as the run kept them, and for published weights float32, or
            bfloat16 where they and `dtype` are so.
        base: The folder of the weights below adapters, in place of the one that the folder names.

    For a model that is none of meshpipe's own, it runs the recipe's Python file, which the checkpoint names: use that
    only with checkpoints that you trust. Raises `ValueError` when the folder holds neither, or its model cannot be made
    as it was.
    """
    folder = expanded("folder", folder)
    if not reader_of(folder).steps():
        if is_published(folder):
            return _published(folder, step, tokenizer, dtype, param_dtype, base)
        raise CheckpointError(
            "A model is in a folder of checkpoints, such as the --run-dir of a run, of published weights, with "
            "config.json and files of safetensors, or of adapters of PEFT. "
            f"Got {str(folder)!r}, which has none of them."
        )
    return _checkpoint(folder, step, tokenizer, dtype, param_dtype, base)


def _published(
    folder: Path,
    step: int | None,
    tokenizer: str | Path | None,
    dtype: DtypeName | None,
    param_dtype: DtypeName | None,
    base: str | Path | None,
) -> Saved:
    if step is not None:
        raise CheckpointError(f"Published weights have no steps. Got step {step} for {folder}. Leave it out.")
    weights = WeightsFolder(folder, base)
    check_same_weights(weights, "weights")
    kept = param_dtype or (weights.param_dtype if dtype == "bfloat16" else "float32")

    def read(model: StagedModel, converts: bool = False) -> list[StateTree]:
        weights.check({path: leaf for stage in model.parameters for path, leaf in stage.all_params.items()})
        wanted = {path: leaf for s in model.local for path, leaf in model.parameters[s].all_params.items()}
        values = weights.read(wanted)
        local = [stage.all_params if s in model.local else {} for s, stage in enumerate(model.parameters)]
        return [{"params": {path: values[path] for path in owned}} for owned in local]

    return Saved(
        name=f"the weights of {weights.place}",
        folder=weights.folder,
        model=_with(weights.model, dtype=dtype, param_dtype=kept),
        lora=LoraConfig() if weights.adapters is None else weights.adapters.lora,
        read=read,
        tokenizer=find_tokenizer(weights.model, tokenizer, list(dict.fromkeys([folder, weights.folder]))),
        generation=weights.generation,
        longest_text=longest_text(weights.folder, weights.model),
        note=weights.rounded_to(kept),
    )


def _with(model: ModelConfig, **changes: Any) -> ModelConfig:
    """The model with settings of how it is computed, but those that are None. Raises `ArgumentError` for a model that
    has no such setting.
    """
    asked = {name: value for name, value in changes.items() if value is not None}
    for name in asked:
        if not hasattr(model, name):
            raise ArgumentError(f"`{name}` is for models that have it. {type(model).__name__} has none. Leave it out.")
    return replace(model, **asked)


def _checkpoint(
    folder: Path,
    step: int | None,
    tokenizer: str | Path | None,
    dtype: DtypeName | None,
    param_dtype: DtypeName | None,
    base: str | Path | None,
) -> Saved:
    reader = reader_of(folder)
    step = list_checkpoints(reader.directory)[-1] if step is None else step
    metadata = reader.metadata(step)
    config = metadata.get("config")
    parts = config if isinstance(config, dict) else {}
    kind = parts["model"].get("type") if isinstance(parts.get("model"), dict) else None
    own = kind in MODELS
    model = saved_model_of(metadata, reader.directory) if own else saved_model(metadata, reader.directory, "recipe")
    model = _with(model, dtype=dtype, param_dtype=param_dtype)
    if base_of(metadata) is not None and param_dtype not in (None, saved_param_dtype(metadata)):
        raise _kept_as_it_was("param_dtype", param_dtype, folder, metadata)
    lora, seed = saved_lora(metadata, reader.directory), metadata.get("seed")
    asked = Config(
        model=model,
        data=TextFilesConfig(),  # weights are read without data
        lora=lora,
        seed=seed if isinstance(seed, int) and 0 <= seed < 2**32 else 0,
        checkpoint=CheckpointConfig(init_from=str(reader.directory), init_step=step),
    )
    if base is not None and base_of(metadata) is None:
        raise ArgumentError(f"`base` is for adapters. Got it with {folder}, whose step {step} has none. Leave it out.")
    start = find_start(asked, None if base is None else str(base))
    assert start is not None

    def read(model: StagedModel, converts: bool = False) -> list[StateTree]:
        return _read(replace(start, converts=converts or start.converts), model, asked.seed)

    places = [reader.directory / PRETRAINED, *_prepared(parts.get("data"))]
    return Saved(
        name=f"step {step} of {reader.directory}",
        folder=reader.directory,
        model=model,
        lora=lora,
        read=read,
        tokenizer=find_tokenizer(model, tokenizer, places),
        generation=GenerationSettings.of(reader.directory / PRETRAINED, model),
        longest_text=longest_text(companions_of(reader.directory), model),
        note=" ".join(start.warnings),
        metadata=metadata,
    )


def _kept_as_it_was(name: str, dtype: str, folder: Path, metadata: Mapping[str, Any]) -> ArgumentError:
    return ArgumentError(
        "The base of adapters is kept as their run kept it, since it is compared with what that had. Got "
        f"`{name}` {dtype} for {folder}, whose run had {saved_param_dtype(metadata)}. Leave it out, or export the "
        "weights with the adapters merged into them."
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
