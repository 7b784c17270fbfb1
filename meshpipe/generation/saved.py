"""A model that was trained, in a folder: what it is, and how its weights come onto the submeshes of a mesh."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from meshpipe.checkpoint import CheckpointConfig, list_checkpoints
from meshpipe.checkpoint.inspection import reader_of
from meshpipe.config import Config
from meshpipe.generation.generator import Generator
from meshpipe.generation.tokenizer import ByteTokenizer, TextTokenizer
from meshpipe.layers.initialise import initialise
from meshpipe.layers.staged_model import StagedModel
from meshpipe.observe.config import ObserveConfig
from meshpipe.processes.coordination import process_count
from meshpipe.processes.group import Group
from meshpipe.runs.recipe import find
from meshpipe.runs.saved_base import check_digest
from meshpipe.runs.saved_model import saved_data, saved_lora, saved_model
from meshpipe.runs.start import Start, find_start
from meshpipe.training.base import digest_of_leaves
from meshpipe.training.state import StateTree


@dataclass(frozen=True)
class Saved:
    """A trained model in a folder. Nothing of its weights has been read yet."""

    config: Config
    """The run that it is from, on one device: its model, adapters, data and seed."""
    start: Start
    """Where the weights are."""
    tokenizer: TextTokenizer | None
    """What its tokens are; None where nothing tells."""

    def __str__(self) -> str:
        return f"step {self.start.step} of {self.start.folder}"

    @property
    def ends(self) -> tuple[int, ...]:
        """The tokens that end a text."""
        end = None if self.tokenizer is None else self.tokenizer.end
        return () if end is None else (end,)

    def generator(self, mesh: Mesh, **arguments: Any) -> Generator:
        """Reads the weights onto a mesh; `arguments` are further ones of `Generator`."""
        tokenizer, lora = self.tokenizer, self.config.lora
        return Generator(self.config.model, self.read, mesh=mesh, tokenizer=tokenizer, lora=lora, **arguments)

    def read(self, model: StagedModel) -> list[StateTree]:
        """Reads the leaves of the local stages onto their submeshes. What the run had drawn from its seed, and did not
        train or save, is drawn again.

        Raises `ValueError` when the weights are those of another model, or damaged.
        """
        self.start.check(model)
        shapes = [{"params": stage.all_params, "state": stage.own_state} for stage in model.parameters]
        trees = [dict(tree) for tree in self.start.read(shapes).trees]
        held = frozenset(path for tree in trees for part in tree.values() for path in part)
        stages = [(s, i) for s in model.local for i in model.cuts[s]]
        lacking = [
            (s, model.layers[i])
            for s, i in stages
            if not held.issuperset((*model.layers[i].params, *model.layers[i].state))
        ]
        if lacking:
            layers = [(layer, model.parameters[s].mesh) for s, layer in lacking]
            made = initialise(layers, model.rules, self.config.seed, model.target, skip=held)
            for (s, _), leaves in zip(lacking, made, strict=True):
                trees[s]["params"] = {**trees[s]["params"], **leaves[0], **leaves[1]}
            self._check_drawn(model, trees)
        return trees

    def _check_drawn(self, model: StagedModel, trees: list[StateTree]) -> None:
        """Raises `ArgumentError` when values drawn from the seed are not those that were left out of the checkpoint."""
        record = self.start.left_out_base
        if record is None or self.start.base is not None:
            return
        frozen = {path for stage in model.parameters for path in stage.frozen}
        drawn = {path: leaf for tree in trees for path, leaf in tree["params"].items() if path in frozen}
        digest = digest_of_leaves(drawn, Group(range(process_count())))
        check_digest(record, digest, f"the first values of seed {self.config.seed}, as they are drawn here,")


def open_saved(folder: str | Path, step: int | None = None, tokenizer: str | Path | None = None) -> Saved:
    """The model of a checkpoint that a command has saved; `step` None takes the newest. `tokenizer` is a file or folder
    of a tokenizer, in place of what the folder tells.

    It runs the recipe's Python file, which the checkpoint names: use it only with checkpoints that you trust. Raises
    `ValueError` when there is no such checkpoint, or its model cannot be made as it was.
    """
    reader = reader_of(folder)
    step = list_checkpoints(reader.directory)[-1] if step is None else step
    metadata = reader.metadata(step)
    model = saved_model(metadata, reader.directory, "recipe")
    recipe = find(metadata["recipe"]).config()
    config = Config(
        model=model,
        data=saved_data(recipe.data, metadata),
        lora=saved_lora(metadata, reader.directory),
        seed=_number(metadata, "seed", recipe.seed),
        batch_size=_number(metadata.get("config", {}), "batch_size", recipe.batch_size),
        eval_batches=recipe.eval_batches,
        checkpoint=CheckpointConfig(init_from=str(reader.directory), init_step=step),
        observe=ObserveConfig(),
    )
    start = find_start(config)
    assert start is not None
    return Saved(config, start, tokenizer_of(config, tokenizer))


def tokenizer_of(config: Config, given: str | Path | None) -> TextTokenizer | None:
    """The tokenizer in a file or folder, or that of a run's data: bytes, where the model has no more tokens; None where
    nothing tells.
    """
    vocab = config.model.limits().get(config.model.input)
    return ByteTokenizer() if vocab == ByteTokenizer.vocab_size else None


def _number(values: Mapping[str, Any], name: str, otherwise: int) -> int:
    found = values.get(name)
    return found if isinstance(found, int) and not isinstance(found, bool) else otherwise
