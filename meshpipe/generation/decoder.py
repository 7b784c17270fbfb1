"""Continues the texts of a group, a row each, and begins others in rows whose texts have ended."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from meshpipe.generation.caching_model import POSITIONS, CachingModel, zeros
from meshpipe.generation.decoding_layers import SAMPLING_FIELDS
from meshpipe.generation.row_copies import RowCopies
from meshpipe.layers.forwards import Forwards
from meshpipe.mesh import DATA, submeshes
from meshpipe.pipeline.everywhere import Everywhere
from meshpipe.pipeline.transfer import transfer_between
from meshpipe.sharding import Arrays, abstract, activation_sharding, batch_sharding, is_local, place
from meshpipe.stage.traced import replaced


@dataclass(kw_only=True)
class Texts:
    """A group of texts: what their next forward needs, on the devices of this process."""

    state: dict[int, Arrays]
    """By stage: caches, and whatever else forward reads besides parameters."""
    positions: np.ndarray
    """The position of the newest token of each row, int32 `[batch]`."""
    fields: dict[int, dict[str, jax.Array]]
    """By stage, how the next token of each row is drawn."""
    tokens: Arrays | None
    """The newest tokens on the submesh of the last stage; None in processes without it."""


@dataclass(kw_only=True)
class Decoder:
    """Continues groups of texts on the submeshes of a mesh.

    A text is a row of tokens. Every forward gives one more token for each row of a group. The caches of a group live
    on the submeshes of the stages, and only tokens go from the last stage back to the first. All calls return at once.
    Every process of the mesh makes the same calls in the same order.
    """

    whole: CachingModel
    """Of all rows of a group."""
    few: CachingModel
    """Of one row for each part of the data axis: it reads the prompts that follow texts that have ended. It is `whole`
    if a group has no more rows."""
    _few_state: dict[int, Arrays] | None = None
    """Its caches, which every beginning overwrites."""
    _copies: tuple[RowCopies, RowCopies] | None = None
    """Of caches, and of tokens."""
    _feed: Callable[[Arrays | None], jax.Array | None] | None = None
    _everywhere: Everywhere | None = None

    @property
    def input(self) -> str:
        return self.whole.input

    @property
    def batch(self) -> int:
        """Rows of a group."""
        return self.whole.batch

    @property
    def parts(self) -> int:
        """Parts into which the data axis splits the rows; each has the same number of rows, one after the other."""
        return self.whole.model.mesh.shape.get(DATA, 1)

    def empty(self) -> Texts:
        """A group whose rows have no texts."""
        last = self.whole.model.stages[-1].submesh
        tokens = zeros((self._tokens_on(last),)) if is_local(last) else None
        positions = np.zeros(self.batch, np.int32)
        return Texts(state=self.whole.empty(), positions=positions, fields={}, tokens=tokens)

    def begin(self, texts: Texts, fields: Mapping[str, np.ndarray]) -> None:
        """Reads the beginnings of texts in all rows, and draws the token after each; see `CachingModel.begin`."""
        texts.tokens, texts.state = self.whole.begin(fields, texts.state)
        texts.positions = fields[POSITIONS].max(axis=1)

    def replace(self, texts: Texts, fields: Mapping[str, np.ndarray], slots: np.ndarray) -> None:
        """Begins a text in one row of each part, `slots[part]` of it, int32; none where that is past its last row.

        The other rows stay as they are. `fields` has one row for each part.
        """
        tokens, self._few_state = self.few.begin(fields, self._few_state or self.few.empty())
        local, meshes = self.few.model.local, [stage.submesh for stage in self.few.model.stages]
        shardings = [activation_sharding(meshes[s], slots.shape, self.parts) for s in local]
        placed = dict(zip(local, place([slots] * len(local), shardings), strict=True))
        if self._copies is None:
            self._copies = self._compiled_copies()
        caches, newest = self._copies
        for s in local:
            places = self.whole.places_of_caches(s)
            kept, new = (tuple([own[s][at] for at in places]) for own in (texts.state, self._few_state))
            texts.state[s] = replaced(texts.state[s], places, caches(s, kept, new, placed[s]))
        if texts.tokens is not None and tokens is not None:
            last = len(meshes) - 1
            texts.tokens = newest(last, texts.tokens, tokens, placed[last])
        rows_of_part = self.batch // self.parts
        rows, written = np.arange(self.parts) * rows_of_part + slots, slots < rows_of_part
        texts.positions = texts.positions.copy()
        texts.positions[rows[written]] = fields[POSITIONS].max(axis=1)[written]

    def draw_by(self, texts: Texts, fields: Mapping[str, np.ndarray]) -> None:
        """From now on the next token of every row is drawn by these `SAMPLING_FIELDS`, `[batch]`."""
        traced = self.whole.forwards(1).traced
        names = {s: [n for n in stage.input_names if n in SAMPLING_FIELDS] for s, stage in traced.items()}
        shardings = {s: [batch_sharding(traced[s].spec.mesh, self.batch)] * len(own) for s, own in names.items()}
        placed = place({s: [fields[n][None] for n in own] for s, own in names.items()}, shardings)
        texts.fields = {s: dict(zip(own, placed[s], strict=True)) for s, own in names.items()}

    def advance(self, texts: Texts, rows: np.ndarray) -> None:
        """Draws the next token of the rows, bool `[batch]`. What the others get is of no use, and does no harm."""
        texts.positions = texts.positions + rows.astype(np.int32)
        inputs = self._inputs(self.whole.forwards(1), texts)
        texts.tokens, texts.state = self.whole.advance(inputs, texts.state)

    def everywhere(self, texts: Texts) -> jax.Array:
        """The newest tokens of all rows, int32 `[batch]`, in every process; to be read later."""
        if self.whole.group.is_alone:
            assert texts.tokens is not None
            return texts.tokens[0]
        if self._everywhere is None:
            mesh = self.whole.model.stages[-1].submesh
            name = f"{self.whole.group.name}/tokens of {self.batch} x {self.whole.length}"
            self._everywhere = Everywhere(name, mesh, submeshes(self.whole.model.mesh), (self._tokens_on(mesh),))
        return self._everywhere(texts.tokens)[0]

    def _inputs(self, forwards: Forwards, texts: Texts) -> dict[int, Any]:
        """What every local stage reads in the forward of a next token: new positions, and what stays."""
        if self._feed is None:
            self._feed = self._feeding()
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

    def _feeding(self) -> Callable[[Arrays | None], jax.Array | None]:
        """The function that makes the newest tokens the input of the first stage; None where that is elsewhere."""
        first, last = self.whole.model.stages[0].submesh, self.whole.model.stages[-1].submesh
        name = f"{self.whole.group.name}/back to the first of {self.batch} x {self.whole.length}"
        shapes = (self._tokens_on(first),)
        move = transfer_between(name, last, shapes) if first != last and (is_local(first) or is_local(last)) else None
        turn = jax.jit(lambda tokens: tokens[None, :, None], out_shardings=batch_sharding(first, self.batch))

        def feed(tokens: Arrays | None) -> jax.Array | None:
            moved = tokens if move is None else move(tokens)
            return turn(moved[0]) if moved is not None and is_local(first) else None

        return feed

    def _compiled_copies(self) -> tuple[RowCopies, RowCopies]:
        """What copies caches, in place, and tokens, of which those before may not have been read."""
        model, cache, parts = self.whole.model, self.whole.model.cache, self.parts
        meshes = {s: model.stages[s].submesh for s in model.local}
        caches = RowCopies(
            {s: (mesh, self.whole.caches(s)) for s, mesh in meshes.items()},
            {s: self.few.caches(s) for s in meshes},
            parts=parts,
            donate=True,
            what="caches",
            cache=cache,
        )
        lasts = {s: mesh for s, mesh in meshes.items() if s == len(model.stages) - 1}
        tokens = RowCopies(
            {s: (mesh, (self._tokens_on(mesh),)) for s, mesh in lasts.items()},
            {s: (_tokens(parts, mesh),) for s, mesh in lasts.items()},
            parts=parts,
            donate=False,
            what="tokens",
            cache=cache,
        )
        return caches, tokens

    def _tokens_on(self, mesh: Mesh) -> jax.ShapeDtypeStruct:
        return _tokens(self.batch, mesh)


def _tokens(batch: int, mesh: Mesh) -> jax.ShapeDtypeStruct:
    return abstract((batch,), jnp.int32, activation_sharding(mesh, (batch,), batch))
