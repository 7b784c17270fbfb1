"""The graph of a model cut into stages: the values that move, and what the layers of each stage read."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from meshpipe.layers.wiring import Field, Output, Source, Wiring
from meshpipe.plan.graph import Graph, Value


@dataclass(frozen=True, slots=True)
class Received:
    """A value that the stage gets from an earlier one, by its index among the inputs of the stage."""

    index: int


Place: TypeAlias = Field | Received | Output
"""Where a stage has a value: in the batch, from an earlier stage, or from one of its own layers. The layers of an
`Output` count from the first one of the stage."""
Keywords: TypeAlias = tuple[tuple[str, Place], ...]


@dataclass(frozen=True)
class StageWiring:
    """What the layers of one stage read, by position only: stages with equal wirings can share a trace."""

    inputs: tuple[Place, ...]
    """What each layer is called with."""
    keywords: tuple[Keywords, ...]
    """What each layer gets besides, by keyword."""
    outputs: tuple[Output, ...]
    """What the layers make of each value of `Graph.outputs`; they count from the first one of the stage."""
    loss: Keywords = ()
    """In the last stage, what the loss gets by keyword."""
    metrics: Keywords = ()


@dataclass(frozen=True)
class CutWiring:
    """The graph of a model that is cut into stages, and the wiring of each stage."""

    graph: Graph
    stages: tuple[StageWiring, ...]


def cut_wiring(
    wiring: Wiring, cuts: Sequence[range], trains: Sequence[bool], *, loss: bool = True, metrics: bool = False
) -> CutWiring:
    """The values that stages of these layers exchange, and what the layers of each stage read.

    `trains` says of each stage whether it has parameters that are trained. What only the loss or the metrics read is
    left out without `loss` or `metrics`.
    """
    of_loss = {
        **{("loss", keyword): source for keyword, source in wiring.loss.items() if loss},
        **{("metrics", keyword): source for keyword, source in wiring.metrics.items() if metrics},
    }
    stage_of = {index: stage for stage, cut in enumerate(cuts) for index in cut}
    readers: dict[Output, set[int]] = {}
    """The later stages that read an output."""
    for stage, cut in enumerate(cuts):
        for source in _reads(wiring, cut, of_loss if stage == len(cuts) - 1 else {}):
            if isinstance(source, Output) and stage_of[source.layer] < stage:
                readers.setdefault(source, set()).add(stage)
    output_of: dict[str | int, Output] = {}
    values = []
    for output in sorted(readers):
        maker, targets = stage_of[output.layer], tuple(sorted(readers[output]))
        name = wiring.names.get(output) or ("" if targets == (maker + 1,) else f"layers/{output.layer}")
        output_of[name or maker] = output
        values.append(Value(name, maker, targets))
    graph = Graph(tuple(trains), tuple(values))
    makers = {value: output_of[value.name or value.source] for value in values}
    stages = (_stage(wiring, graph, stage, cut, makers, of_loss) for stage, cut in enumerate(cuts))
    return CutWiring(graph, tuple(stages))


def _reads(wiring: Wiring, cut: range, of_loss: Mapping[Any, Source]) -> Iterator[Source]:
    for index in cut:
        yield from wiring.reads(index)
    if of_loss:
        yield from of_loss.values()


def _stage(
    wiring: Wiring,
    graph: Graph,
    stage: int,
    cut: range,
    makers: Mapping[Value, Output],
    of_loss: Mapping[tuple[str, str], Source],
) -> StageWiring:
    received = {makers[value]: Received(index) for index, value in enumerate(graph.inputs(stage))}

    def place(source: Source) -> Place:
        if isinstance(source, Field):
            return source
        return received.get(source) or own(source)

    def own(output: Output) -> Output:
        return replace(output, layer=output.layer - cut.start)

    def keywords(given: Mapping[str, Source]) -> Keywords:
        return tuple((keyword, place(source)) for keyword, source in sorted(given.items()))

    is_last = stage == graph.num_stages - 1
    of = {what: {k: s for (w, k), s in of_loss.items() if w == what and is_last} for what in ("loss", "metrics")}
    return StageWiring(
        inputs=tuple(place(wiring.inputs[index]) for index in cut),
        keywords=tuple(keywords(wiring.keywords[index]) for index in cut),
        outputs=tuple(own(makers[value]) for value in graph.outputs(stage)),
        loss=keywords(of["loss"]),
        metrics=keywords(of["metrics"]),
    )
