"""How likely a language model takes texts to be: scores of continuations."""

import itertools
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np

from meshpipe.compiler.cache import CompileCache
from meshpipe.errors import ArgumentError
from meshpipe.generation.decoding_layers import with_last_call
from meshpipe.generation.lengths import LEAST_BEGINNING, check_tokens, power_of_two
from meshpipe.generation.memory import check_activations
from meshpipe.generation.scoring import COUNT, PLACES, TARGETS, Score, score_continuations
from meshpipe.generation.staged_weights import StagedWeights
from meshpipe.layers.choice import Choice
from meshpipe.layers.forwards import Forwards
from meshpipe.layers.layer import LayerLike
from meshpipe.layers.microbatches import Microbatches
from meshpipe.layers.staged_model import StagedModel
from meshpipe.layers.task import Task
from meshpipe.mesh import DATA, submeshes
from meshpipe.models.model import ModelConfig
from meshpipe.pipeline.config import PipelineConfig
from meshpipe.pipeline.everywhere import Everywhere
from meshpipe.plan.schedules import gpipe
from meshpipe.processes.agreement import agree
from meshpipe.processes.group import Group
from meshpipe.sharding import Arrays, local_value

Pair = tuple[Sequence[int], Sequence[int]]
"""The tokens of a context, and those of its continuation."""


@dataclass(frozen=True, order=True)
class _Shape:
    """What rows are compiled for: tokens of a row, and tokens of a continuation."""

    seq: int
    width: int


@dataclass(kw_only=True)
class Scorer:
    """Scores continuations with the weights of a generator, on its mesh; `Generator.scorer` makes it.

    Texts run in groups, of which as many are under way as the generator has in flight, so that every rank has work.
    The last stage computes logits at the positions of continuations alone, and hands out two numbers for each text.
    Every process of the mesh must make the same calls.
    """

    model: ModelConfig
    layers: Sequence[LayerLike]
    staged: StagedWeights
    cache: CompileCache | None
    group: Group
    batch_size: int
    """The most texts of a group."""
    in_flight: int
    _forwards: dict[tuple[int, _Shape], Forwards] = field(default_factory=dict)
    _everywhere: dict[int, Everywhere] = field(default_factory=dict)
    _calls: Iterator[int] = field(default_factory=itertools.count)

    def __post_init__(self) -> None:
        like = self.staged.model
        ranks, smallest = like.mesh.devices.shape[0], _Shape(LEAST_BEGINNING, 1)
        task = Task(
            with_last_call(self.layers, score_continuations, "score"),
            _no_loss,
            batch=self._shapes(like.mesh.shape.get(DATA, 1), smallest),
            input=self.model.input,
            rules=like.rules,
        )
        self._model = StagedModel(
            task, mesh=like.mesh, config=PipelineConfig(), choice=Choice(gpipe(ranks, 1), like.cuts, None)
        )
        self._model.cache = self.cache
        owned, values = self._model.parameters, self.staged.values
        self._params = {s: tuple(values[s][path] for path in owned[s].params) for s in self._model.local}
        self._state = {s: tuple(values[s][path] for path in owned[s].state) for s in self._model.local}
        self._seed = self._model.place_seed(0)  # layers in evaluation mode draw nothing

    def tokens(self, pairs: Sequence[Pair]) -> list[Score]:
        """The score of each continuation after its context; argument and errors as those of `stream`."""
        found = dict(self.stream(pairs))
        return [found[number] for number in range(len(pairs))]

    def stream(self, pairs: Sequence[Pair]) -> Iterator[tuple[int, Score]]:
        """Every score as soon as it is known, with the number of its pair.

        Arguments:
            pairs: The tokens of each context, at least one, and of its continuation, which may have none.

        Raises `ValueError` for a context without tokens, tokens that the model does not have, and a text that is longer
        than the model allows.
        """
        pairs = [(list(context), list(continuation)) for context, continuation in pairs]
        for number, pair in enumerate(pairs):
            self._check(number, *pair)
        if not self.group.is_alone:
            agree(self.group, f"scores {next(self._calls)}", {"texts": str(pairs)})
        return self._run(pairs)

    def _run(self, pairs: Sequence[Pair]) -> Iterator[tuple[int, Score]]:
        yield from ((number, Score(0.0, True)) for number, (_, continuation) in enumerate(pairs) if not continuation)
        scored = [number for number, (_, continuation) in enumerate(pairs) if continuation]
        size = min(self.batch_size, power_of_two(-(-len(scored) // self.in_flight), 1))
        unread: deque[tuple[list[int], Arrays]] = deque()
        for numbers, shape in self._grouped({number: pairs[number] for number in scored}, size):
            unread.append((numbers, self._dispatch([pairs[number] for number in numbers], size, shape)))
            if len(unread) > self.in_flight:  # one more than are under way: no rank waits for the host
                yield from self._read(*unread.popleft())
        for dispatched in unread:
            yield from self._read(*dispatched)

    def _check(self, number: int, context: Sequence[int], continuation: Sequence[int]) -> None:
        if not context:
            raise ArgumentError(
                f"A context must have at least one token. Got none in text {number}. Begin it with the token that "
                "begins or ends texts."
            )
        check_tokens(self.model, [*context, *continuation], f"text {number}")
        most, length = getattr(self.model, "max_positions", None), len(context) + len(continuation) - 1
        if most is not None and length > most:
            raise ArgumentError(
                f"A text must fit into the {most} positions of the model, but for its last token. Got {length} tokens "
                f"before the last in text {number}. Shorten its context."
            )

    def _grouped(self, pairs: Mapping[int, Pair], size: int) -> Iterator[tuple[list[int], _Shape]]:
        """Numbers of up to `size` texts that run together, compiled for the same lengths; long texts first."""
        shapes = {number: self._shape(*pair) for number, pair in pairs.items()}
        ordered = sorted(shapes, key=shapes.__getitem__, reverse=True)
        for shape, same in itertools.groupby(ordered, key=shapes.__getitem__):
            numbers = list(same)
            for at in range(0, len(numbers), size):
                yield numbers[at : at + size], shape

    def _shape(self, context: Sequence[int], continuation: Sequence[int]) -> _Shape:
        seq = power_of_two(len(context) + len(continuation) - 1, LEAST_BEGINNING)
        most = getattr(self.model, "max_positions", None)
        return _Shape(seq if most is None else min(seq, most), power_of_two(len(continuation), 1))

    def _dispatch(self, pairs: Sequence[Pair], size: int, shape: _Shape) -> Arrays:
        """The scores of a group, in every process; to be read later."""
        parts = self._model.mesh.shape.get(DATA, 1)
        batch = -(-size // parts) * parts
        key = batch, shape
        if key not in self._forwards:
            self._forwards[key] = self._compiled(batch, shape)
        forwards = self._forwards[key]
        inputs = forwards.inputs(self._fields(pairs, batch, shape), self._seed)
        outputs = forwards.executor().outputs(self._params, self._state, inputs)
        return self._shared(forwards, batch, outputs[0] if outputs else None)

    def _compiled(self, batch: int, shape: _Shape) -> Forwards:
        name = f"{self.group.name}/scores of {batch} x {shape.seq}, {shape.width}"
        microbatches = Microbatches(self._shapes(batch, shape), self.model.input, 1, self._model.mesh)
        forwards = self._model.forwards(name, microbatches, outputs=True, what="score")
        check_activations(
            forwards.programs,
            self._model.mesh,
            at_once=self.in_flight,
            what=f"scoring {batch} x {shape.seq} tokens",
            way_out="Lower `batch_size`, or shorten the texts.",
        )
        return forwards

    def _shared(self, forwards: Forwards, batch: int, outputs: Arrays | None) -> Arrays:
        if self.group.is_alone:
            assert outputs is not None
            return outputs
        if batch not in self._everywhere:
            assert forwards.output is not None
            source, name = forwards.meshes[-1], f"{self.group.name}/scores of {batch}"
            shapes = forwards.output.on(source, batch)
            self._everywhere[batch] = Everywhere(name, source, submeshes(self._model.mesh), shapes)
        return self._everywhere[batch](outputs)

    def _read(self, numbers: Sequence[int], scores: Arrays) -> Iterator[tuple[int, Score]]:
        """Waits for the scores of a group, whose last rows may only fill it up."""
        read = np.asarray if self.group.is_alone else local_value
        for number, logprob, is_greedy in zip(numbers, *(read(array).tolist() for array in scores), strict=False):
            yield number, Score(logprob, is_greedy)

    def _fields(self, pairs: Sequence[Pair], batch: int, shape: _Shape) -> dict[str, np.ndarray]:
        """Texts are filled up on the right, which nothing before reads; missing texts are empty."""
        fields = {name: np.zeros(s.shape, s.dtype) for name, s in self._shapes(batch, shape).items()}
        for row, (context, continuation) in enumerate(pairs):
            text, count = [*context, *continuation[:-1]], len(continuation)
            fields[self.model.input][row, : len(text)] = text
            fields[PLACES][row, :count] = range(len(context) - 1, len(text))
            fields[TARGETS][row, :count] = continuation
            fields[COUNT][row] = count
        return fields

    def _shapes(self, batch: int, shape: _Shape) -> dict[str, jax.ShapeDtypeStruct]:
        sizes = {self.model.input: (batch, shape.seq), PLACES: (batch, shape.width), TARGETS: (batch, shape.width)}
        return {name: jax.ShapeDtypeStruct(size, jnp.int32) for name, size in {**sizes, COUNT: (batch,)}.items()}


def _no_loss(output: object, batch: object) -> tuple[jax.Array, jax.Array]:
    raise AssertionError("scoring computes no loss")
