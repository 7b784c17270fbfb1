"""The compiled forwards that continue texts: one for the beginning of a text, one for each next token."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from meshpipe.compiler.cache import CompileCache
from meshpipe.generation.decoding_layers import SAMPLING_FIELDS, decoding_layers
from meshpipe.layers.choice import Choice
from meshpipe.layers.forwards import Forwards
from meshpipe.layers.layer import LayerLike
from meshpipe.layers.microbatches import Microbatches
from meshpipe.layers.staged_model import StagedModel
from meshpipe.layers.task import Task
from meshpipe.mesh import submeshes
from meshpipe.pipeline.config import PipelineConfig
from meshpipe.pipeline.everywhere import Everywhere
from meshpipe.pipeline.transfer import transfer_between
from meshpipe.plan.schedules import gpipe
from meshpipe.processes.group import Group
from meshpipe.sharding import (
    Arrays,
    ShardingRules,
    abstract,
    activation_sharding,
    batch_sharding,
    is_local,
    place,
)

POSITIONS = "positions"


@dataclass(kw_only=True)
class Texts:
    """A group of texts that are continued together: what their next forward needs, on the devices of this process."""

    state: dict[int, Arrays]
    """By stage: caches, and whatever else forward reads besides parameters."""
    fields: dict[int, dict[str, jax.Array]]
    """By stage, the fields of the batch that stay the same."""
    positions: np.ndarray
    """The position of the newest token of each text, int32 `[batch]`."""
    tokens: Arrays | None = None
    """The newest tokens on the submesh of the last stage; None in processes without it."""


@dataclass(kw_only=True)
class Decoder:
    """Continues groups of `batch` texts of up to `length` positions, on the submeshes of a mesh.

    A text is a row of tokens. Every forward gives one more token for each text of a group. The caches of a group live
    on the submeshes of the stages, and only tokens go from the last stage back to the first. All calls return at once.
    Every process of the mesh makes the same calls in the same order.
    """

    model: StagedModel
    group: Group
    batch: int
    """Texts of a group; a multiple of the data axis."""
    length: int
    input: str
    """The batch field that the first layer is called with."""
    weights: Mapping[int, Mapping[str, jax.Array]]
    """By local stage and leaf path, all values but those of caches."""
    _next: Forwards | None = None
    _beginnings: dict[int, Forwards] = field(default_factory=dict)
    """By the number of tokens that a row has."""
    _feed: Any = None
    _everywhere: Everywhere | None = None
    _hoisted: dict[int, Arrays] | None = None

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
    ) -> "Decoder":
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
        return cls(model=model, group=group, batch=batch, length=length, input=input, weights=weights)

    def begin(self, fields: Mapping[str, np.ndarray]) -> Texts:
        """Reads the beginnings of a group of texts, and draws the token after each.

        `fields` has the input `[batch, seq]`, `positions` and `SAMPLING_FIELDS`; see `decoding_layers`.
        """
        seq = fields[self.input].shape[1]
        if seq not in self._beginnings:
            self._beginnings[seq] = self._compiled(f"a beginning of {seq} tokens", seq)
        forwards = self._beginnings[seq]
        executor = forwards.executor()
        inputs = forwards.inputs(fields, self._seed)
        texts = Texts(state=self._empty(), fields=self._kept_fields(fields), positions=fields[POSITIONS].max(axis=1))
        hoisted = executor.hoist(self._params, texts.state)
        outputs, texts.state = executor.advance(self._params, texts.state, inputs, hoisted)
        texts.tokens = outputs[0] if outputs else None
        return texts

    def advance(self, texts: Texts) -> None:
        """Draws the next token of every text of a group."""
        forwards = self._next_forwards()
        executor = forwards.executor()
        if self._hoisted is None:
            self._hoisted = executor.hoist(self._params, texts.state)
        texts.positions = texts.positions + np.int32(1)
        inputs = self._inputs(forwards, texts)
        outputs, texts.state = executor.advance(self._params, texts.state, inputs, self._hoisted)
        texts.tokens = outputs[0] if outputs else None

    def everywhere(self, texts: Texts) -> jax.Array:
        """The newest tokens of a group, int32 `[batch]`, in every process; to be read later."""
        if self.group.is_alone:
            assert texts.tokens is not None
            return texts.tokens[0]
        if self._everywhere is None:
            mesh = self.model.stages[-1].submesh
            name = f"{self.group.name}/tokens of {self.batch} x {self.length}"
            self._everywhere = Everywhere(name, mesh, submeshes(self.model.mesh), (self._tokens_on(mesh),))
        return self._everywhere(texts.tokens)[0]

    def compile(self) -> None:
        """Compiles the forward of a next token, which else happens when it is first needed."""
        self._next_forwards()

    def _next_forwards(self) -> Forwards:
        if self._next is None:
            self._next = self._compiled("a next token", 1)
            self._feed = self._feeding()
        return self._next

    def _compiled(self, what: str, seq: int) -> Forwards:
        name = f"{self.group.name}/{self.batch} x {self.length}, {what}"
        microbatches = Microbatches(_shapes(self.input, self.batch, seq), self.input, 1, self.model.mesh)
        return self.model.forwards(name, microbatches, outputs=True, what="generate")

    def _feeding(self) -> Any:
        """The function that makes the newest tokens the input of the first stage; None where that is elsewhere."""
        first, last = self.model.stages[0].submesh, self.model.stages[-1].submesh
        name = f"{self.group.name}/back to the first of {self.batch} x {self.length}"
        shapes = (self._tokens_on(first),)
        move = transfer_between(name, last, shapes) if first != last and (is_local(first) or is_local(last)) else None
        turn = jax.jit(lambda tokens: tokens[None, :, None], out_shardings=batch_sharding(first, self.batch))

        def feed(tokens: Arrays | None) -> jax.Array | None:
            moved = tokens if move is None else move(tokens)
            return turn(moved[0]) if moved is not None and is_local(first) else None

        return feed

    def _tokens_on(self, mesh: Mesh) -> jax.ShapeDtypeStruct:
        return abstract((self.batch,), jnp.int32, activation_sharding(mesh, (self.batch,), self.batch))

    def _inputs(self, forwards: Forwards, texts: Texts) -> dict[int, Any]:
        """What every local stage reads in the forward of a next token: new positions, and what stays."""
        tokens = self._feed(texts.tokens)
        positions = texts.positions[None, :, None]
        reading = [s for s, stage in forwards.traced.items() if POSITIONS in stage.input_names]
        shardings = [batch_sharding(forwards.traced[s].spec.mesh, self.batch) for s in reading]
        placed = dict(zip(reading, place([positions] * len(reading), shardings), strict=True))

        def value(s: int, name: Any) -> Any:
            if name == self.input:
                return tokens
            return placed[s] if name == POSITIONS else texts.fields[s][name]

        return {s: tuple(value(s, name) for name in stage.input_names) for s, stage in forwards.traced.items()}

    def _kept_fields(self, fields: Mapping[str, np.ndarray]) -> dict[int, dict[str, jax.Array]]:
        """The sampling fields on the submesh of each local stage that reads them."""
        traced = self._next_forwards().traced
        names = {s: [n for n in stage.input_names if n in SAMPLING_FIELDS] for s, stage in traced.items()}
        shardings = {s: [batch_sharding(traced[s].spec.mesh, self.batch)] * len(own) for s, own in names.items()}
        placed = place({s: [fields[n][None] for n in own] for s, own in names.items()}, shardings)
        return {s: dict(zip(own, placed[s], strict=True)) for s, own in names.items()}

    def _empty(self) -> dict[int, Arrays]:
        """The state of all local stages, with empty caches."""
        found: dict[int, Arrays] = {}
        for s in self.model.local:
            shapes = self.model.parameters[s].state
            caches = {path: shape for path, shape in shapes.items() if is_cache(path)}
            values = {**self.weights[s], **dict(zip(caches, _zeros(tuple(caches.values())), strict=True))}
            found[s] = tuple(values[path] for path in shapes)
        return found


def is_cache(path: str) -> bool:
    """Whether a leaf is a cache of keys or values."""
    return path.endswith(("/cache/keys", "/cache/values"))


def _zeros(shapes: tuple[jax.ShapeDtypeStruct, ...]) -> Arrays:
    if not shapes:
        return ()
    make = jax.jit(
        lambda: tuple(jnp.zeros(shape.shape, shape.dtype) for shape in shapes),
        out_shardings=tuple(shape.sharding for shape in shapes),
    )
    return make()


def _shapes(input: str, batch: int, seq: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The fields of a batch in generation."""
    rows = {input: jnp.int32, POSITIONS: jnp.int32}
    dtypes = dict(zip(SAMPLING_FIELDS, (jnp.uint32, jnp.uint32, jnp.float32, jnp.int32, jnp.float32), strict=True))
    return {name: jax.ShapeDtypeStruct((batch, seq), dtype) for name, dtype in rows.items()} | {
        name: jax.ShapeDtypeStruct((batch,), dtype) for name, dtype in dtypes.items()
    }


def _no_loss(output: Any, batch: Mapping[str, Any]) -> tuple[jax.Array, jax.Array]:
    raise AssertionError("generation computes no loss")
