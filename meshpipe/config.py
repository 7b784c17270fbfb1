"""The complete configuration of one training run, as returned by a recipe."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from meshpipe.adapters.config import LoraConfig
from meshpipe.adapters.lora import with_lora
from meshpipe.checkpoint import CheckpointConfig
from meshpipe.checkpoint.names import CHECKPOINTS
from meshpipe.data import DataConfig, check_source, example_batch
from meshpipe.errors import ArgumentError, check_seed, check_whole
from meshpipe.files import expand_fields
from meshpipe.layers.layer import LayerLike
from meshpipe.layers.task import Task
from meshpipe.mesh import MeshConfig
from meshpipe.models.model import ModelConfig
from meshpipe.observe.config import ObserveConfig
from meshpipe.optimizer.config import OptimizerConfig
from meshpipe.pipeline.config import PipelineConfig
from meshpipe.sharding import PRESETS
from meshpipe.weights.published_model import PublishedModel

COUNT_LIMIT = 2**31
"""Steps and examples must be below this: Optax counts updates in 32 bits."""
PARTS: dict[str, type] = {
    "model": ModelConfig,
    "data": DataConfig,
    "mesh": MeshConfig,
    "pipeline": PipelineConfig,
    "optimizer": OptimizerConfig,
    "checkpoint": CheckpointConfig,
    "observe": ObserveConfig,
    "lora": LoraConfig,
}


@dataclass(frozen=True, kw_only=True)
class Config:
    """One run: its model, data, layout and outputs.

    Raises `ValueError` when the batch does not divide into microbatches, or a microbatch over the data axis.
    """

    model: ModelConfig
    """The layers and their loss."""
    data: DataConfig
    """The source of the examples."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    """Sizes of the mesh axes."""
    sharding: Literal["replicated", "fully-sharded"] = "replicated"
    """How the data axis holds parameters and optimizer state: `replicated` on every part of it, or `fully-sharded`
    over it between steps."""
    pipeline: Annotated[PipelineConfig, tyro.conf.OmitArgPrefixes] = field(default_factory=PipelineConfig)
    """Schedule, microbatches, rematerialisation and partition of layers into stages."""
    optimizer: Annotated[OptimizerConfig, tyro.conf.OmitArgPrefixes] = field(default_factory=OptimizerConfig)
    """Optimizer and learning-rate schedule."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Adapters that are trained in place of the model."""
    checkpoint: Annotated[CheckpointConfig, tyro.conf.OmitArgPrefixes] = field(default_factory=CheckpointConfig)
    """Where and how often to save, and whether to resume."""
    observe: Annotated[ObserveConfig, tyro.conf.OmitArgPrefixes] = field(default_factory=ObserveConfig)
    """Trackers and the profiler."""
    trainable: tuple[str, ...] | None = None
    """Patterns of the leaf paths of the parameters to train, such as `layers/3/*`; `!` in front of one excludes. The
    others are frozen. None trains all, or, in a model with LoRA, its adapters alone."""
    steps: int = 100
    """Total number of updates, counted from step 0 even after a resume."""
    batch_size: int = 64
    """Examples per update, over the whole mesh."""
    seed: int = 0
    """Seed of the parameters, the dropout masks and the order of the data."""
    skip_nonfinite: int = 0
    """Batches with a non-finite loss or gradient that a run may skip, leaving out their updates; one more ends the run.
    0 ends it at the first."""
    run_dir: str | None = None
    """Folder for all outputs of the run, made when missing: settings, checkpoints, metrics, trace, pictures and log.
    Flags for single outputs, such as --metrics, take precedence for theirs. With --resume, the run continues in it."""
    force: bool = False
    """Start even if the run needs more memory than there is, by prediction; and measure costs on any device."""
    for_accelerators: Annotated[bool, tyro.conf.Suppress] = False
    """Whether a recipe is meant for accelerators: `meshpipe recipes` marks it, and on a machine without any its costs
    are counted, not measured."""
    compile_cache: str | None = None
    """Folder that keeps compiled programs for later runs; None keeps none."""
    metrics: str | None = None
    """JSON-lines file for the metrics; appended to on resume. None writes none."""
    measure_every: int = 0
    """Every so many steps, time the actions of a step for `bubble_fraction` in the metrics; 0 times none. A timed step
    does not overlap with its neighbours; other steps are not slowed down."""
    trace: str | None = None
    """Trace file (.json) of the timed steps, for Perfetto, with a picture of the first next to it. Without
    --measure-every, the third step of the run is timed. None writes none."""
    eval_every: int = 0
    """Updates between evaluations on held-out data; 0 evaluates only after the last update."""
    eval_batches: int = 8
    """Batches per evaluation, of --batch-size examples; the last of the data may be smaller. 0 turns evaluation off."""

    def __post_init__(self) -> None:
        for name, kind in PARTS.items():
            if not isinstance(getattr(self, name), kind):
                got = type(getattr(self, name)).__name__
                raise ArgumentError(f"{name} of a Config must be a {kind.__name__}. Got a {got}.")
        if isinstance(self.model, PublishedModel):
            frozen = self.lora.rank > 0 and self.trainable is None
            options = self.checkpoint
            found = self.model.found(options.init_from, self._own_checkpoints, base=options.init_base, frozen=frozen)
            object.__setattr__(self, "model", found)
        check_seed(self.seed)
        expand_fields(self, "run_dir", "compile_cache", "metrics", "trace")
        if self.run_dir is None:
            self.checkpoint.check_folder_given()
        self.observe.check_folders(self.run_dir)
        least = {
            "steps": 0,
            "batch_size": 1,
            "skip_nonfinite": 0,
            "measure_every": 0,
            "eval_every": 0,
            "eval_batches": 0,
        }
        for name, low in least.items():
            check_whole(name, getattr(self, name), low, COUNT_LIMIT)
        microbatches = self.pipeline.num_microbatches
        if self.batch_size % (microbatches * self.mesh.data):
            raise ArgumentError(
                "`batch_size` must be a multiple of `num_microbatches` * `mesh.data`. "
                f"Got {self.batch_size} with {microbatches} * {self.mesh.data} = {microbatches * self.mesh.data}. "
                f"{_nearest_batch_sizes(self.batch_size, microbatches * self.mesh.data)}"
            )

    @property
    def _own_checkpoints(self) -> str | None:
        """The folder whose checkpoints the run may continue."""
        if not self.checkpoint.may_continue or self.checkpoint.checkpoint_dir is not None or self.run_dir is None:
            return self.checkpoint.checkpoint_dir if self.checkpoint.may_continue else None
        return str(Path(self.run_dir) / CHECKPOINTS)

    def layers(self) -> Sequence[LayerLike]:
        """The layers of the model, with the adapters of the run. Raises `ValueError` where none can be had."""
        return with_lora(_as_list("layers", self.model.layers()), self.lora)

    def task(self) -> Task:
        """The task of the run. Raises `ValueError` when the data cannot be read, or the model has no list of layers."""
        return Task(
            self.layers(),
            self.model.loss,
            batch=example_batch(check_source(self.data.train_source()), self.batch_size),
            input=self.model.input,
            metrics=self.model.metrics,
            tied=_as_list("tied", self.model.tied()),
            trainable=self.trainable,
            notes=self.model.notes,
            rules=PRESETS[self.sharding],
        )


def _as_list(name: str, value: Any) -> Sequence[Any]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise ArgumentError(
            f"{name}() of a model must return a list. Got {value!r:.80}, of type {type(value).__name__}. Return [...]."
        )
    return value


def _nearest_batch_sizes(batch_size: int, unit: int) -> str:
    below, above = batch_size // unit * unit, -(-batch_size // unit) * unit
    return f"The nearest sizes that fit are {below} and {above}." if below else f"The smallest that fits is {above}."
