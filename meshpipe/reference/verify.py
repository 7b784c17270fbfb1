"""Parallel against plain: the same training at a layout and on one device, compared leaf by leaf."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, SupportsFloat

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from meshpipe.config import Config
from meshpipe.data import batches
from meshpipe.data.arrays import copy_batch
from meshpipe.layers.examine import abstract_layers
from meshpipe.layers.fields import LayerCall
from meshpipe.layers.layer import LayerLike
from meshpipe.layers.stage_function import Loss
from meshpipe.layers.task import Task
from meshpipe.layers.trainable import Trainable, freeze
from meshpipe.mesh import make_mesh
from meshpipe.models.reference import Reference
from meshpipe.phases import each, phase
from meshpipe.pipeline.config import PipelineConfig
from meshpipe.reference.comparison import Comparison, VerifyReport
from meshpipe.reference.layered import LayeredModel
from meshpipe.reference.plain import PlainModel, PlainTraining, Values
from meshpipe.reference.snapshot import Snapshot, overwrite, record_gradients, snapshot
from meshpipe.reference.uncut import UncutModel, adapters_add_to_kernels
from meshpipe.sharding import PRESETS, ShardingRules
from meshpipe.trainer import Trainer

Batch = dict[str, np.ndarray]
COPIES = 4
"""How often verification holds all values beside the trainer: at the start, before and after an update, and as plain
training leaves them."""


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
    trainable: Trainable = None,
    rules: ShardingRules | None = None,
    compile_cache: str | None = None,
    reference: Reference | nnx.Module | Callable[[nnx.Rngs], nnx.Module] | None = None,
    check_memory: bool = False,
) -> VerifyReport:
    """Makes one update for each of the batches at the layout and on one device, and compares all that they compute.

    Arguments are those of `Trainer`, and `reference`: the uncut model that the layers were cut from, which is then
    trained on one device in place of the layers, so that no code of meshpipe's layers judges itself. A model or its
    constructor is enough if it takes the input field alone, else it is a `Reference`.

    Every update is judged by itself. The plain side starts it from the trainer's parameters, optimizer state and other
    state; compared are the loss, the gradient norm, every gradient as the optimizer got it, and the state that forward
    leaves; then what Optax makes of those gradients, parameters and optimizer state. Tied parameters must be the same,
    and frozen ones stay the same, to the bit. Before the first update the initial values are compared. At last the
    trainer makes all updates again from the beginning without being looked at in between, and must have the same losses
    and norms. The arrays that it is handed are overwritten as soon as `step` returns.

    The tolerance of a leaf is `sqrt(eps)` of the coarsest floating dtype, times the leaf's largest value. Where layers
    do not say otherwise, matrices are multiplied in full precision, which accelerators by themselves do not do for
    float32. `check_memory` counts these copies too. Raises `ValueError` as `Trainer` does, without batches, in several
    processes, and if leaves of layers are not found in the reference.
    """
    rows = _copied(batches)
    config = PipelineConfig() if pipeline is None else pipeline
    rules = ShardingRules() if rules is None else rules
    trainer = Trainer.of(
        Task(layers, loss, batch=rows[0], input=input, tied=tied, trainable=trainable, rules=rules),
        optax.chain(record_gradients(), optimizer),
        mesh=make_mesh() if mesh is None else mesh,
        pipeline=config,
        seed=seed,
        clip_norm=clip_norm,
        compile_cache=compile_cache,
        check_memory=check_memory,
        copies=COPIES,
    )
    comparison = Comparison(_tolerance(trainer))
    _compare_counts(comparison, trainer)
    if not all(difference.ok for difference in comparison.differences):  # no leaf could be named
        return VerifyReport(tuple(comparison.differences), comparison.tolerance, "its own layers")
    with phase("Preparing plain training"):
        model = _plain_model(trainer, layers, reference, input, seed)
        training = PlainTraining(
            model, loss, optimizer, seed=seed, num_microbatches=config.num_microbatches, clip_norm=clip_norm
        )
    _Verification(trainer, model, training, optimizer, comparison).run(rows)
    return VerifyReport(tuple(comparison.differences), comparison.tolerance, model.describe())


def _copied(batches: Iterable[Mapping[str, Any]]) -> list[Batch]:
    rows = [copy_batch(batch) for batch in batches]  # a loader may use its arrays again for the next batch
    if not rows:
        raise ValueError("Verification needs at least one batch. Got none.")
    if jax.process_count() > 1:
        raise ValueError(f"Verification runs in one process. Got {jax.process_count()}; start it without launch.")
    return rows


def verify_recipe(config: Config, updates: int = 3) -> VerifyReport:
    """`verify` for a recipe's config, on the first batches that it would train on, with the reference of its model.

    Adapters are added to the kernels of the reference. Where they drop inputs or have groups, or a kernel has dims that
    are neither inputs nor outputs, a model with adapters is compared with its own layers.
    """
    if config.optimizer.groups:
        task = config.task()
        layers = freeze(abstract_layers(task.layers, task.batch), task.trainable, task.tied)
        config.optimizer.check(path for layer in layers for path in layer.params)
    return verify(
        config.layers(),
        config.model.loss,
        config.optimizer.build(config.steps),
        batches=itertools.islice(batches(config.data.train_source(), config.batch_size, config.seed), updates),
        mesh=config.mesh.build(),
        input=config.model.input,
        pipeline=config.pipeline,
        seed=config.seed,
        clip_norm=config.optimizer.clip_norm,
        tied=config.model.tied(),
        trainable=config.trainable,
        rules=PRESETS[config.sharding],
        compile_cache=config.compile_cache,
        reference=_reference(config),
        check_memory=not config.force,
    )


def _reference(config: Config) -> Reference | None:
    reference, lora = config.model.reference(), config.lora
    if reference is None or not lora.rank:
        return reference
    _, scale = lora.size_of("")
    return None if lora.dropout or lora.groups else replace(reference, adapter_scale=scale)


class _Verification:
    """The updates of a trainer, each compared with the same update on one device."""

    def __init__(
        self,
        trainer: Trainer,
        model: PlainModel,
        training: PlainTraining,
        optimizer: optax.GradientTransformation,
        comparison: Comparison,
    ):
        self._trainer, self._model, self._training, self._comparison = trainer, model, training, comparison
        owned = {path: shape for stage in trainer.model.parameters for path, shape in stage.owned.items()}
        self._owned = {path: model.names[path] for path in owned}
        """By path of a parameter that the trainer updates, its name on the plain side."""
        self._frozen = [path for layer in trainer.model.layers for path in layer.state if path in layer.frozen]
        params = {name: owned[path] for path, name in reversed(self._owned.items())}
        self._opt_state = jax.eval_shape(optimizer.init, params)

    def run(self, batches: Sequence[Batch]) -> None:
        with phase("Comparing initial values"):
            start = jax.tree.map(jnp.copy, self._trainer.state_tree())
            before = snapshot(self._trainer, self._training.device)
            for quantity, leaves in (("initial parameter", before.params), ("initial state", before.state)):
                own = {path: self._model.initial[n] for path, n in self._names(leaves) if n in self._model.initial}
                self._comparison.leaves(0, quantity, leaves, own)
            self._compare_tied(0, before)
        scalars = []
        for update, batch in enumerate(each("Comparing", "update", batches), start=1):
            found = self._step(batch)
            after = snapshot(self._trainer, self._training.device)
            scalars.append({quantity: float(value) for quantity, value in found.items()})
            self._compare(update, batch, scalars[-1], before, after)
            before = after
        self._trainer.load_state_tree(start, 0)
        again = [self._step(batch) for batch in each("Repeating", "update", batches)]
        for update, (found, expected) in enumerate(zip(again, scalars, strict=True), start=1):
            for quantity, value in found.items():
                self._comparison.scalar(update, f"uninterrupted {quantity}", float(value), expected[quantity])

    def _step(self, batch: Batch) -> dict[str, SupportsFloat]:
        """The scalars of an update, by quantity."""
        borrowed = {name: np.array(value) for name, value in batch.items()}
        result = self._trainer.step(borrowed)
        overwrite(borrowed)
        terms = {f"term {name}": value for name, value in result.terms.items()}
        return {"loss": result.loss, "gradient norm": result.grad_norm, **terms}

    def _compare(
        self, update: int, batch: Batch, scalars: Mapping[str, float], before: Snapshot, after: Snapshot
    ) -> None:
        values = self._values(before)
        expected = self._training.gradients(values, batch, update - 1)
        terms = {f"term {name}": value for name, value in expected.terms.items()}
        wanted = {"loss": expected.loss, "gradient norm": expected.norm, **terms}
        for quantity in dict.fromkeys((*wanted, *scalars)):
            self._comparison.scalar(update, quantity, scalars.get(quantity, 0.0), wanted.get(quantity, 0.0))
        self._compare_tied(update, after)
        if not expected.counts:
            self._compare_left_out(update, before, after)
            return
        gradients = {path: expected.gradients[name] for path, name in self._owned.items()}
        others = {name: g for name, g in expected.gradients.items() if name not in self._owned.values()}
        self._comparison.leaves(update, "gradient", after.gradients, {**gradients, **others})
        written, kept = ({n: expected.written.get(n, v) for n, v in w.items()} for w in (values.params, values.state))
        recorded = {name: after.gradients[path] for path, name in reversed(self._owned.items())}
        updated = self._training.update(Values(written, kept, values.opt_state), recorded)
        changed = {**expected.written, **updated.once}
        state = {path: changed[name] for path, name in self._names(after.state) if name in changed}
        self._comparison.leaves(update, "state", after.state, state)
        params = {path: updated.params[name] for path, name in self._owned.items()}
        self._comparison.changes(update, "parameter", after.params, params, before.params)
        for path in self._frozen:
            self._comparison.exact(update, "frozen parameter", path, after.params[path], before.params[path])
        self._compare_optimizer(update, before, after, updated.opt_state)

    def _compare_left_out(self, update: int, before: Snapshot, after: Snapshot) -> None:
        """Where nothing in the batch counts, everything has to stay as it was."""
        for quantity, old, new in (("parameter", before.params, after.params), ("state", before.state, after.state)):
            for path, leaf in old.items():
                self._comparison.exact(update, quantity, path, new[path], leaf)
        self._compare_optimizer(update, before, after, before.optimizer_state(self._opt_state))

    def _compare_optimizer(self, update: int, before: Snapshot, after: Snapshot, expected: Any) -> None:
        leaves = jax.tree_util.tree_flatten_with_path(expected)[0]
        for stage, (old, new) in enumerate(zip(before.optimizer, after.optimizer, strict=True)):
            named = {_place(key, self._owned, stage): key for key, _ in leaves if key in new}
            values = {name: dict(leaves)[key] for name, key in named.items()}
            found, start = ({name: tree[key] for name, key in named.items()} for tree in (new, old))
            self._comparison.changes(update, "optimizer state", found, values, start)

    def _compare_tied(self, update: int, now: Snapshot) -> None:
        first: dict[str, str] = {}
        for path, name in self._names(now.params):
            owner = first.setdefault(name, path)
            if owner != path:
                self._comparison.exact(update, "tied parameter", path, now.params[path], now.params[owner])

    def _values(self, now: Snapshot) -> Values:
        held = {name: leaf for path, name, leaf in reversed(self._held(now))}
        leaves = {**self._model.kept, **held}
        params = {name: leaf for name, leaf in leaves.items() if name in self._model.trained}
        state = {name: leaf for name, leaf in leaves.items() if name not in params}
        return Values(params, state, now.optimizer_state(self._opt_state))

    def _held(self, now: Snapshot) -> list[tuple[str, str, jax.Array]]:
        leaves = {**now.params, **now.state}
        return [(path, name, leaves[path]) for path, name in self._names(leaves)]

    def _names(self, leaves: Mapping[str, Any]) -> list[tuple[str, str]]:
        return [(path, self._model.names[path]) for path in leaves]


def _plain_model(
    trainer: Trainer,
    layers: Sequence[LayerLike],
    reference: Reference | nnx.Module | Callable[[nnx.Rngs], nnx.Module] | None,
    input: str,
    seed: int,
) -> PlainModel:
    tied = trainer.model.tied
    scaled = isinstance(reference, Reference) and reference.adapter_scale is not None
    if reference is None or (scaled and not adapters_add_to_kernels({**trainer.params, **trainer.state})):
        made = abstract_layers(layers, trainer.model.microbatches.shapes)
        whole = [layer.freezing(own.frozen) for layer, own in zip(made, trainer.model.layers, strict=True)]
        return LayeredModel(whole, trainer.model.wiring, seed=seed, tied=tied)
    given = reference if isinstance(reference, Reference) else Reference(reference)
    params, state = trainer.params, trainer.state
    frozen = [path for layer in trainer.model.layers for path in layer.frozen]
    own = [layer.layer if isinstance(layer, LayerCall) else layer for layer in layers]
    named = trainer.model.wiring.loss
    return UncutModel(given, own, params, state, input=input, named=named, seed=seed, tied=tied, frozen=frozen)


def _compare_counts(comparison: Comparison, trainer: Trainer) -> None:
    """Every variable of a layer has to be a leaf of its own, or two of them would have one value."""
    leaves = (*trainer.params, *trainer.state)
    for layer in trainer.model.layers:
        variables = [v for _, v in nnx.to_flat_state(layer.structure) if not isinstance(v, nnx.RngState)]
        found = sum(path.startswith(f"{layer.path}/") for path in leaves)
        comparison.exact(0, "number of leaves", layer.path, found, len(variables))


def _place(key: Any, owned: Mapping[str, str], stage: int) -> str:
    """A leaf of the optimizer's state as a report names it: under the parameter's path, or as the stage's own."""
    names = [str(part) for part in key if getattr(part, "key", None) not in owned]
    of = [part.key for part in key if getattr(part, "key", None) in owned]
    where = "".join(names).lstrip(".")
    return f"{of[0]} ({where})" if of else f"stage {stage} ({where})"


def _tolerance(trainer: Trainer) -> float:
    """The square root of the epsilon of the coarsest floating dtype of any value of the traced stages."""
    dtypes = {
        value.aval.dtype
        for stage in trainer.model.traced.values()
        for value in (*stage.closed.jaxpr.invars, *(v for e in stage.closed.jaxpr.eqns for v in e.outvars))
        if jnp.issubdtype(value.aval.dtype, jnp.floating)
    } | {leaf.dtype for leaf in trainer.params.values()}
    return float(np.sqrt(max(float(jnp.finfo(dtype).eps) for dtype in {*dtypes, jnp.dtype(jnp.float32)})))
