"""The stages of a model with caches for a number of texts, and their compiled forwards."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from meshpipe.compiler.cache import CompileCache
from meshpipe.generation.decoding_layers import SAMPLING_FIELDS, decoding_layers
from meshpipe.generation.memory import check_activations
from meshpipe.layers.choice import Choice
from meshpipe.layers.forwards import Forwards
from meshpipe.layers.layer import LayerLike
from meshpipe.layers.microbatches import Microbatches
from meshpipe.layers.staged_model import StagedModel
from meshpipe.layers.task import Task
from meshpipe.pipeline.config import PipelineConfig
from meshpipe.plan.schedules import gpipe
from meshpipe.processes.group import Group
from meshpipe.sharding import Arrays, Shapes, ShardingRules

POSITIONS = "positions"


@dataclass(kw_only=True)
class CachingModel:
    """Forwards of `batch` texts at a time, with caches of `length` positions for each."""

    model: StagedModel
    group: Group
    batch: int
    """A multiple of the data axis."""
    length: int
    input: str
    """The batch field that the first layer is called with."""
    weights: Mapping[int, Mapping[str, jax.Array]]
    """By local stage and leaf path, all values but those of caches."""
    at_once: int = 1
    """How many of its forwards run at a time, in groups of texts."""
    _forwards: dict[int, Forwards] = field(default_factory=dict)
    """By the number of tokens that a row has."""
    _hoisted: dict[int, Arrays] | None = None
    """What the forward of a next token reads of the parameters, computed once."""

    def __post_init__(self) -> None:
        owned = {s: self.model.parameters[s] for s in self.model.local}
        self._params = {s: tuple(self.weights[s][path] for path in owned[s].params) for s in owned}
        self._seed = self.model.place_seed(0)  # layers in evaluation mode draw nothing

    @classmethod
    def of(
        cls,
        layers: Sequence[LayerLike],
        *,
        input: str,
        batch: int,
        length: int,
        mesh: Mesh,
        cuts: tuple[range, ...],
        rules: ShardingRules,
        weights: Mapping[int, Mapping[str, jax.Array]],
        group: Group,
        cache: CompileCache | None = None,
        at_once: int = 1,
    ) -> "CachingModel":
        """Examines the layers; nothing is compiled or allocated. `cuts` has the layers of each rank."""
        task = Task(
            decoding_layers(layers, batch, length),
            _no_loss,
            batch=_shapes(input, batch, 1),
            input=input,
            rules=rules,
        )
        choice = Choice(gpipe(mesh.devices.shape[0], 1), cuts, None)
        model = StagedModel(task, mesh=mesh, config=PipelineConfig(), choice=choice, overwrites_state=True)
        model.cache = cache
        return cls(model=model, group=group, batch=batch, length=length, input=input, weights=weights, at_once=at_once)

    def forwards(self, seq: int) -> Forwards:
        """The forward of rows of `seq` tokens: of a next token if that is 1, else of a beginning.

        Raises `ArgumentError` when its activations do not fit into memory.
        """
        if seq not in self._forwards:
            what = "the decode step" if seq == 1 else f"the prefill of {seq} tokens"
            name = f"{self.group.name}/{self.batch} x {self.length}, {what}"
            microbatches = Microbatches(_shapes(self.input, self.batch, seq), self.input, 1, self.model.mesh)
            forwards = self.model.forwards(name, microbatches, outputs=True, what=f"generate, {what}")
            texts = f"{self.batch} texts" if self.batch > 1 else "a text"
            check_activations(
                forwards.programs,
                self.model.mesh,
                at_once=self.at_once,
                what=f"{what}, of {texts},",
                way_out="Lower `batch_size` or `in_flight`, or shorten the prompts.",
            )
            self._forwards[seq] = forwards
        return self._forwards[seq]

    def begin(
        self, fields: Mapping[str, np.ndarray], state: dict[int, Arrays]
    ) -> tuple[Arrays | None, dict[int, Arrays]]:
        """Reads the beginnings of all texts, and draws the token after each; `state` is donated.

        `fields` has the input `[batch, seq]`, `positions` and `SAMPLING_FIELDS`; see `decoding_layers`. Returns the
        tokens on the last submesh, None in processes without it, and the state afterwards.
        """
        forwards = self.forwards(fields[self.input].shape[1])
        executor = forwards.executor()
        hoisted = executor.hoist(self._params, state)
        outputs, after = executor.advance(self._params, state, forwards.inputs(fields, self._seed), hoisted)
        return (outputs[0] if outputs else None), after

    def advance(
        self, inputs: Mapping[int, Arrays], state: dict[int, Arrays]
    ) -> tuple[Arrays | None, dict[int, Arrays]]:
        """Draws the next token of every text; returns what `begin` does. `inputs` are those of every local stage."""
        executor = self.forwards(1).executor()
        if self._hoisted is None:
            self._hoisted = executor.hoist(self._params, state)
        outputs, after = executor.advance(self._params, state, inputs, self._hoisted)
        return (outputs[0] if outputs else None), after

    def empty(self) -> dict[int, Arrays]:
        """By local stage: empty caches, and whatever else forward reads besides parameters."""
        found: dict[int, Arrays] = {}
        for s in self.model.local:
            paths = list(self.model.parameters[s].state)
            caches = dict(zip(self.places_of_caches(s), zeros(self.caches(s)), strict=True))
            found[s] = tuple(caches[at] if at in caches else self.weights[s][path] for at, path in enumerate(paths))
        return found

    def places_of_caches(self, stage: int) -> list[int]:
        """Where the caches of a local stage are in its state."""
        return [at for at, path in enumerate(self.model.parameters[stage].state) if is_cache(path)]

    def caches(self, stage: int) -> Shapes:
        """The caches of a local stage."""
        shapes = list(self.model.parameters[stage].state.values())
        return tuple(shapes[at] for at in self.places_of_caches(stage))


def is_cache(path: str) -> bool:
    """Whether a leaf is a cache of keys or values."""
    return path.endswith(("/cache/keys", "/cache/values"))


def zeros(shapes: Shapes) -> Arrays:
    """New arrays of zeros, with the shardings of the shapes."""
    return _making_zeros(shapes)() if shapes else ()


@functools.lru_cache(maxsize=256)
def _making_zeros(shapes: Shapes) -> Callable[[], Arrays]:
    """Kept, since every group of texts begins with it: a new function would be compiled anew."""
    return jax.jit(
        lambda: tuple(jnp.zeros(shape.shape, shape.dtype) for shape in shapes),
        out_shardings=tuple(shape.sharding for shape in shapes),
    )


def _shapes(input: str, batch: int, seq: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The fields of a batch in generation."""
    rows = {input: jnp.int32, POSITIONS: jnp.int32}
    dtypes = dict(zip(SAMPLING_FIELDS, (jnp.uint32, jnp.uint32, jnp.float32, jnp.int32, jnp.float32), strict=True))
    return {name: jax.ShapeDtypeStruct((batch, seq), dtype) for name, dtype in rows.items()} | {
        name: jax.ShapeDtypeStruct((batch,), dtype) for name, dtype in dtypes.items()
    }


def _no_loss(output: object, batch: object) -> tuple[jax.Array, jax.Array]:
    raise AssertionError("generation computes no loss")
