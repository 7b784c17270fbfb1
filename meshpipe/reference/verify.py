"""Parallel against plain: the same training at a layout and on one device, compared leaf by leaf."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from meshpipe.config import Config
from meshpipe.data import batches
from meshpipe.data.arrays import copy_batch
from meshpipe.layers.layer import LayerLike, abstract_layers
from meshpipe.layers.stage_function import Loss
from meshpipe.mesh import make_mesh
from meshpipe.pipeline.config import PipelineConfig
from meshpipe.reference.plain import PlainTrainer
from meshpipe.sharding import PRESETS, ShardingRules, widened
from meshpipe.trainer import Trainer

SMALL = 1e-2
"""A leaf whose values are all below this share of the largest is judged against that share: its own may be rounding."""


@dataclass(frozen=True)
class Difference:
    """The largest difference of one quantity between the layout and one device."""

    update: int
    """0 before the first update."""
    quantity: str
    """`loss`, `gradient norm`, `initial parameter`, `gradient`, `parameter` or `state`."""
    path: str
    """Leaf path; empty for scalars of the whole model."""
    found: float
    """Largest absolute difference over the leaf's elements."""
    allowed: float

    @property
    def ok(self) -> bool:
        return self.found <= self.allowed  # False for NaN as well

    @property
    def layer(self) -> str:
        """`layers/3`, or the name of the quantity for a scalar."""
        return "/".join(self.path.split("/")[:2]) or self.quantity


@dataclass(frozen=True)
class VerifyReport:
    """All differences, in the order in which they would first show: scalars, then layers."""

    differences: tuple[Difference, ...]
    tolerance: float
    """Relative tolerance: the square root of the machine epsilon of the coarsest dtype in the computation."""

    @property
    def ok(self) -> bool:
        return all(d.ok for d in self.differences)

    @property
    def first(self) -> Difference | None:
        """The first that is too large: of the earliest update, in the first layer."""
        bad = [d for d in self.differences if not d.ok]
        return min(bad, key=lambda d: (d.update, not d.path, _layer_number(d))) if bad else None

    def worst_by_layer(self) -> dict[tuple[str, str], Difference]:
        """For each layer and quantity, the difference that comes closest to its tolerance or passes it."""
        worst: dict[tuple[str, str], Difference] = {}
        for d in self.differences:
            key = (d.layer, d.quantity)
            if key not in worst or _ratio(d) > _ratio(worst[key]):
                worst[key] = d
        return worst


class RecordState(NamedTuple):
    """The gradients of the last update, as the optimizer saw them."""

    gradients: Any


def record_gradients() -> optax.GradientTransformation:
    """Passes gradients on and keeps them, so that those compared are those that made the update."""

    def init(params: Any) -> RecordState:
        return RecordState(jax.tree.map(jnp.zeros_like, params))

    def update(updates: Any, state: RecordState, params: Any = None) -> tuple[Any, RecordState]:
        return updates, RecordState(updates)

    return optax.GradientTransformation(init, update)


@contextmanager
def _full_precision() -> Iterator[None]:
    """Products of matrices in full precision, in all threads: stages are compiled in several."""
    before = jax.config.values["jax_default_matmul_precision"]
    jax.config.update("jax_default_matmul_precision", "highest")
    try:
        yield
    finally:
        jax.config.update("jax_default_matmul_precision", before)


@_full_precision()
def verify(
    layers: Sequence[LayerLike],
    loss: Loss,
    optimizer: optax.GradientTransformation,
    *,
    batches: Iterable[Mapping[str, Any]],
    mesh: Mesh | None = None,
    input: str = "inputs",
    pipeline: PipelineConfig | None = None,
    seed: int = 0,
    clip_norm: float | None = None,
    tied: Sequence[Sequence[str]] = (),
    rules: ShardingRules | None = None,
    compile_cache: str | None = None,
) -> VerifyReport:
    """Makes one update for each of the batches at the layout and on one device, and compares all that they compute.

    Arguments are those of `Trainer`. Compared are the initial parameters; after each update the loss, the gradient
    norm and every gradient as the optimizer got it; after the last the parameters and other state. The tolerance of
    a leaf is `sqrt(eps)` of the coarsest floating dtype, times the leaf's largest value. Where layers do not say
    otherwise, matrices are multiplied in full precision, which accelerators by themselves do not do for float32. Raises
    `ValueError` as `Trainer` does, and without batches.
    """
    rows = [copy_batch(batch) for batch in batches]  # a loader may use its arrays again for the next batch
    if not rows:
        raise ValueError("Verification needs at least one batch. Got none.")
    config = pipeline or PipelineConfig()
    recording = optax.chain(record_gradients(), optimizer)
    trainer = Trainer(
        layers,
        loss,
        recording,
        batch=rows[0],
        mesh=make_mesh() if mesh is None else mesh,
        input=input,
        pipeline=config,
        seed=seed,
        clip_norm=clip_norm,
        tied=tied,
        rules=rules,
        compile_cache=compile_cache,
    )
    plain = PlainTrainer(
        abstract_layers(layers, trainer.model.microbatches.shapes),
        loss,
        optimizer,
        input=input,
        seed=seed,
        num_microbatches=config.num_microbatches,
        clip_norm=clip_norm,
        tied=trainer.model.tied,
    )
    comparison = Comparison(_tolerance(trainer))
    comparison.leaves(0, "initial parameter", trainer.params, plain.params)
    certain: dict[str, np.ndarray] = {}
    for update, batch in enumerate(rows, start=1):
        result = trainer.step(batch)
        expected_loss, expected_norm, gradients = plain.step(batch)
        comparison.scalar(update, "loss", float(result.loss), expected_loss)
        comparison.scalar(update, "gradient norm", float(result.grad_norm), expected_norm)
        comparison.leaves(update, "gradient", _recorded(trainer), gradients)
        for path, found in comparison.certain(gradients).items():
            certain[path] = found & certain.get(path, np.bool_(True))
    comparison.leaves(len(rows), "parameter", trainer.params, plain.params, certain)
    comparison.leaves(len(rows), "state", trainer.state, plain.state)
    return VerifyReport(tuple(comparison.differences), comparison.tolerance)


def verify_recipe(config: Config, updates: int = 3) -> VerifyReport:
    """`verify` for a recipe's config, on the first batches that it would train on."""
    return verify(
        config.model.layers(),
        config.model.loss,
        config.optimizer.build(config.steps),
        batches=itertools.islice(batches(config.data.train_source(), config.batch_size, config.seed), updates),
        mesh=config.mesh.build(),
        input=config.model.input,
        pipeline=config.pipeline,
        seed=config.seed,
        clip_norm=config.optimizer.clip_norm,
        tied=config.model.tied(),
        rules=PRESETS[config.sharding],
        compile_cache=config.compile_cache,
    )


class Comparison:
    """Collects differences, each against a tolerance relative to the size of what is compared."""

    def __init__(self, tolerance: float):
        self.tolerance = tolerance
        self.differences: list[Difference] = []

    def scalar(self, update: int, quantity: str, found: float, expected: float) -> None:
        self.differences.append(
            Difference(update, quantity, "", abs(found - expected), self.tolerance * max(abs(expected), self.tolerance))
        )

    def leaves(
        self,
        update: int,
        quantity: str,
        found: Mapping[str, Any],
        expected: Mapping[str, Any],
        certain: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        """Compares every leaf of `expected`; elements that are not `certain` are left out."""
        largest = max((_largest(leaf) for leaf in expected.values()), default=0.0)
        for path, leaf in expected.items():
            a, b = widened(found[path]), widened(leaf)
            difference = np.abs(a - b) if certain is None else np.where(certain[path], np.abs(a - b), 0.0)
            allowed = self.tolerance * max(_largest(b), SMALL * largest)
            self.differences.append(Difference(update, quantity, path, float(np.max(difference, initial=0.0)), allowed))

    def certain(self, gradients: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Where a gradient is exactly 0 or well above rounding.

        Adam and its like divide a gradient by its own size, so what they make of pure rounding errors is as large
        as any update and says nothing; the gradient itself has been compared everywhere.
        """
        largest = max((_largest(leaf) for leaf in gradients.values()), default=0.0)
        return {
            path: (g == 0) | (np.abs(g) >= self.tolerance * max(_largest(g), SMALL * largest))
            for path, g in gradients.items()
        }


def _recorded(trainer: Trainer) -> dict[str, Any]:
    """The gradients kept by `record_gradients`, by leaf path."""
    prefix = "0/gradients/"
    return {
        key.removeprefix(prefix): leaf
        for tree in trainer.state_tree()
        for key, leaf in tree["optimizer"].items()
        if key.startswith(prefix)
    }


def _tolerance(trainer: Trainer) -> float:
    """The square root of the epsilon of the coarsest floating dtype of any value of the traced stages."""
    dtypes = {
        value.aval.dtype
        for stage in trainer.model.traced.values()
        for value in (*stage.closed.jaxpr.invars, *(v for e in stage.closed.jaxpr.eqns for v in e.outvars))
        if jnp.issubdtype(value.aval.dtype, jnp.floating)
    } | {leaf.dtype for leaf in trainer.params.values()}
    return float(np.sqrt(max(float(jnp.finfo(dtype).eps) for dtype in {*dtypes, jnp.dtype(jnp.float32)})))


def _largest(leaf: Any) -> float:
    return float(np.max(np.abs(widened(leaf)), initial=0.0))


def _ratio(difference: Difference) -> float:
    if np.isnan(difference.found):
        return float("inf")
    return difference.found / difference.allowed if difference.allowed else float(difference.found > 0) * float("inf")


def _layer_number(difference: Difference) -> int:
    parts = difference.path.split("/")
    return int(parts[1]) if len(parts) > 1 and parts[1].isdigit() else -1
