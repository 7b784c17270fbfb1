"""Which stage makes which values, which stages read them, and where gradients go: plain data."""

import re
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import pairwise


@dataclass(frozen=True, slots=True)
class Value:
    """An output of a stage that later stages read: it moves once to each rank that reads it."""

    name: str
    """Unique in a graph; or empty, for a value that only the next stage reads and that no user has named."""
    source: int
    """The stage that makes it."""
    targets: tuple[int, ...]
    """The later stages that read it, ascending; never empty."""

    def __str__(self) -> str:
        """For example `memory 1 -> 2 3`."""
        return f"{self.name} {self.source} -> {' '.join(map(str, self.targets))}".lstrip()

    @classmethod
    def parse(cls, text: str) -> "Value":
        """Reads what `str` writes; raises `ValueError` for any other text."""
        match = re.fullmatch(r"(?:(\S+) )?([0-9]{1,9}) -> ([0-9]{1,9}(?: [0-9]{1,9})*)", text)
        if match is None:
            raise ValueError(
                "A value is a name, the stage that makes it, an arrow and the stages that read it, e.g. "
                f"`memory 1 -> 2 3`; one without a name goes to the next stage. Got {text!r}."
            )
        return cls(match[1] or "", int(match[2]), tuple(map(int, match[3].split())))


@dataclass(frozen=True)
class Graph:
    """The values of a model cut into stages."""

    trains: tuple[bool, ...]
    """For each stage: whether it has parameters that are trained."""
    values: tuple[Value, ...]
    """All values, by source, then in the order in which the source makes them."""

    def __post_init__(self) -> None:
        for value in self.values:
            _check(value, len(self.trains))
        names = [value.name or value.source for value in self.values]
        if len(set(names)) < len(names):
            twice = next(value for value in self.values if names.count(value.name or value.source) > 1)
            raise ValueError(f"Every value of a graph needs a name of its own. Got {twice} beside another.")
        if any(before.source > after.source for before, after in pairwise(self.values)):
            raise ValueError("The values of a graph must be in the order of the stages that make them.")

    @property
    def num_stages(self) -> int:
        return len(self.trains)

    @cached_property
    def is_chain(self) -> bool:
        """Whether every stage is trained, and reads the one value of the stage before it, without a name."""
        return self == chain(self.num_stages)

    def inputs(self, stage: int) -> tuple[Value, ...]:
        """What the stage reads of earlier stages: by source, then in the order of `values`."""
        return self._inputs[stage]

    def outputs(self, stage: int) -> tuple[Value, ...]:
        """What the stage makes for later stages, in order."""
        return self._outputs[stage]

    def has_backward(self, stage: int) -> bool:
        """Whether the stage is trained, or reads a value that has a gradient."""
        return self._backward[stage]

    def has_gradient(self, value: Value) -> bool:
        """Whether the stages that read the value send its gradient back: whether its source has a backward."""
        return self._backward[value.source]

    def sources(self, stage: int) -> tuple[int, ...]:
        """The stages whose outputs the stage reads, ascending."""
        return self._sources.get(stage, ())

    def readers(self, stage: int) -> tuple[int, ...]:
        """The stages that send it a gradient, ascending: those that read its outputs, if it has a backward."""
        return self._readers.get(stage, ())

    @cached_property
    def _sources(self) -> dict[int, tuple[int, ...]]:
        return {s: tuple(sorted({v.source for v in inputs})) for s, inputs in enumerate(self._inputs)}

    @cached_property
    def _readers(self) -> dict[int, tuple[int, ...]]:
        return {
            s: tuple(sorted({target for value in outputs for target in value.targets}))
            for s, outputs in enumerate(self._outputs)
            if self._backward[s]
        }

    @cached_property
    def _inputs(self) -> tuple[tuple[Value, ...], ...]:
        return tuple(tuple(v for v in self.values if stage in v.targets) for stage in range(self.num_stages))

    @cached_property
    def _outputs(self) -> tuple[tuple[Value, ...], ...]:
        return tuple(tuple(v for v in self.values if v.source == stage) for stage in range(self.num_stages))

    @cached_property
    def _backward(self) -> tuple[bool, ...]:
        found: list[bool] = []
        for stage, trained in enumerate(self.trains):
            found.append(trained or any(found[value.source] for value in self._inputs[stage]))
        return tuple(found)


@cache
def chain(num_stages: int) -> Graph:
    """Trained stages that each read the output of the one before."""
    values = tuple(Value("", stage, (stage + 1,)) for stage in range(num_stages - 1))
    return Graph((True,) * num_stages, values)


def _check(value: Value, num_stages: int) -> None:
    if not value.targets or list(value.targets) != sorted(set(value.targets)):
        raise ValueError(f"The stages that read a value must ascend, and there must be one. Got {value}.")
    if not 0 <= value.source < value.targets[0] or value.targets[-1] >= num_stages:
        raise ValueError(f"A value goes from one of the {num_stages} stages to later ones. Got {value}.")
    if not value.name and value.targets != (value.source + 1,):
        raise ValueError(f"A value without a name goes to the next stage alone. Got {value}.")
