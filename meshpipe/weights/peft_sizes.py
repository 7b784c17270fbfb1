"""The rank and the alpha that adapter_config.json gives each module."""

import re
from collections import Counter
from collections.abc import Mapping

from meshpipe.adapters.config import LoraConfig
from meshpipe.adapters.groups import LoraGroup
from meshpipe.models.model import ModelConfig
from meshpipe.weights.errors import WeightsError
from meshpipe.weights.fields import Fields
from meshpipe.weights.peft import modules_of, patterns_of

Size = tuple[int, float]
"""Rank and alpha."""
_LONGEST = 1_000
"""Letters of a pattern."""
_SLOW = re.compile(r"\)[*+{]|([*+{].*){5}")
"""Patterns that may take for ever: repeated groups, or many repetitions."""


class PeftSizes:
    """What `r`, `lora_alpha`, `rank_pattern` and `alpha_pattern` of a config say. Raises `WeightsError` for values that
    PEFT does not write.
    """

    def __init__(self, fields: Fields) -> None:
        self.stabilised = fields.flag("use_rslora", False)
        self.rest: Size = fields.size("r"), _positive(fields, "lora_alpha", 8.0)
        self._ranks, self._alphas = (_Patterns(fields, name) for name in ("rank_pattern", "alpha_pattern"))

    def of(self, module: str) -> Size:
        """Those of a module of transformers, by its name."""
        rank, alpha = self.rest
        return self._ranks.size(module, rank), self._alphas.number(module, alpha)

    def alpha_of(self, module: str, rank: int) -> float:
        """The alpha of an adapter with the scale of a module's, and so many of its ranks."""
        whole, alpha = self.of(module)
        share = alpha * (rank / whole) ** 0.5 if self.stabilised else alpha * rank / whole
        known = self.rest[1]
        return known if abs(share - known) < 1e-9 * known else share  # of what an export here had multiplied


class _Patterns:
    """The values of single modules, by regular expressions of the ends of their names."""

    def __init__(self, fields: Fields, name: str) -> None:
        found = fields.nested(name)
        self._fields = Fields({}, f"{name} of {fields.place}") if found is None else found
        self._patterns = {pattern: _compiled(pattern, self._fields) for pattern in self._fields.values}

    def size(self, module: str, rest: int) -> int:
        pattern = self._first(module)
        return rest if pattern is None else self._fields.size(pattern)

    def number(self, module: str, rest: float) -> float:
        pattern = self._first(module)
        return rest if pattern is None else _positive(self._fields, pattern)

    def _first(self, module: str) -> str | None:
        return next((text for text, pattern in self._patterns.items() if pattern.match(module)), None)


def _positive(fields: Fields, name: str, *default: float) -> float:
    value = fields.number(name, *default)
    if not value:
        raise fields.wrong(name, "a number above 0")
    return value


def _compiled(pattern: str, fields: Fields) -> re.Pattern[str]:
    problem = "which may take for ever" if len(pattern) > _LONGEST or _SLOW.search(pattern) else None
    if problem is None:
        try:
            return re.compile(rf"(.*\.)?({pattern})$")
        except re.error as error:
            problem = f"which is none: {error}"
    raise WeightsError(
        f"A key of {fields.place} must be the end of a module's name, or a regular expression of it. Got "
        f"{pattern!r:.80}, {problem}."
    )


def lora_of(model: ModelConfig, sizes: Mapping[str, Size], said: PeftSizes, dropout: float) -> LoraConfig:
    """The config of adapters whose sizes are given by the paths of their modules; the most frequent is that of the
    rest.
    """
    counts = Counter(sizes.values())
    rank, alpha = max(counts, key=lambda size: (counts[size], size == said.rest, size))
    groups: list[LoraGroup] = []
    for size in sorted(counts.keys() - {(rank, alpha)}):
        own = {path for path, other in sizes.items() if other == size}
        changed = size[0] if size[0] != rank else None, size[1] if size[1] != alpha else None
        groups += [LoraGroup(pattern=p, rank=changed[0], alpha=changed[1]) for p in patterns_of(own, sizes)]
    return LoraConfig(
        rank=rank,
        alpha=alpha,
        targets=patterns_of(sizes, modules_of(model)),
        dropout=dropout,
        rank_stabilised=said.stabilised,
        groups=tuple(groups),
    )
