"""Which modules of a layer get an adapter: those whose paths match patterns."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from flax import nnx

from meshpipe.adapters.adapted import KINDS, dims_of, is_adapted, kernel_of, kind_for
from meshpipe.adapters.config import LoraConfig
from meshpipe.adapters.groups import as_groups
from meshpipe.adapters.patterns import matches
from meshpipe.errors import ArgumentError, kind_of
from meshpipe.layers.paths import join

DEFAULT = "*"
"""Stands for no pattern."""
BY_DEFAULT = tuple(kind for kind in KINDS if not issubclass(kind, nnx.Embed))
"""The modules that get an adapter where there is no pattern."""
_ADAPTED = "which has an adapter already"
_FITS_NONE = "an adapter fits none of the model's modules"
Key = tuple[Any, ...]
"""Attributes and indices that lead to a module inside a layer."""


@dataclass
class Targets:
    """The patterns of a config, and what each has matched so far."""

    config: LoraConfig
    _found: dict[str, list[str]] = field(default_factory=dict)
    """By pattern, what it matched that can be adapted."""
    _others: dict[str, list[str]] = field(default_factory=dict)
    """By pattern, what it matched that cannot be, in words."""
    _every: list[str] = field(default_factory=list)
    """The path of every module that could have an adapter."""
    _chosen: list[str] = field(default_factory=list)
    """The path of every module that gets one."""

    @property
    def patterns(self) -> tuple[str, ...]:
        """None is every linear module, and no embedding."""
        return self.config.targets or ()

    def among(self, path: str, module: nnx.Module) -> tuple[Key, ...]:
        """The parts of a layer that get an adapter. Raises `ArgumentError` for a part that is named and cannot have
        one, and where the rank exceeds a kernel's.
        """
        found = []
        for key, part in _parts(module):
            place = join(path, key)
            kind = kind_for(part)
            if kind is not None:
                self._every.append(place)
            named = [p for p in self.patterns if not p.startswith("!") and matches(place, p)]
            if not self.patterns and isinstance(part, BY_DEFAULT):
                named = [DEFAULT]
            if not named or any(matches(place, p[1:]) for p in self.patterns if p.startswith("!")):
                continue
            problem = _problem(part)
            for pattern in named:
                if problem is not None and not any(c in pattern.rpartition("/")[2] for c in "*?["):
                    raise ArgumentError(
                        f"`targets` must name modules that an adapter fits: {_kinds()}. {pattern!r} names {place}, "
                        f"{problem}. Name others, or leave it out with '!{place}'.",
                        "lora",
                    )
                (self._found if problem is None else self._others).setdefault(pattern, []).append(
                    place if problem is None else f"{place}, {problem}"
                )
            if problem is None:
                self._check_rank(place, part)
                self._chosen.append(place)
                found.append(key)
        return tuple(found)

    def check(self) -> None:
        """Raises `ArgumentError` for a pattern that found nothing, after all layers were looked at."""
        if not self.patterns and not self._found:
            raise self._none_by_default()
        for pattern in self.patterns:
            if pattern.startswith("!") or pattern in self._found:
                continue
            instead = f"an adapter fits {_few(self._every)}" if self._every else _FITS_NONE
            got = "which matches nothing"
            if others := self._others.get(pattern):
                got = f"which matches only {'; '.join(others[:3])}"
            raise ArgumentError(
                f"Each of `targets` must match the path of a module that an adapter fits ({_kinds()}), or the end of "
                f"one. Got {pattern!r}, {got}; {instead}.",
                "lora",
            )
        self._check_groups()

    def _check_groups(self) -> None:
        used = {self.config.group_of(place) for place in self._chosen}
        for group in as_groups(self.config.groups):
            if group not in used:
                taken = any(group.matches(place) for place in self._chosen)
                found = "groups before it have all that it matches" if taken else "it matches none"
                raise ArgumentError(
                    f"A group of `groups` must match a module with an adapter. Got {group.pattern!r}: {found}. "
                    f"Modules with an adapter are {_few(self._chosen)}.",
                    "lora",
                )

    def _none_by_default(self) -> ArgumentError:
        others = self._others.get(DEFAULT, [])
        if self._every:
            way_out = f"An adapter fits {_few(self._every)}: name what gets one in `targets`."
        elif others and all(other.endswith(_ADAPTED) for other in others):
            way_out = "Train those adapters, or merge them first with meshpipe.merge_lora."
        else:
            way_out = f"{_FITS_NONE.capitalize()}."
        got = f"which has only {_few(others, '; ', 3)}" if others else "which has none of these"
        return ArgumentError(
            f"By default every {', '.join(f'nnx.{kind.__name__}' for kind in BY_DEFAULT)} gets an adapter. "
            f"Got a model {got}. {way_out}",
            "lora",
        )

    def _check_rank(self, place: str, part: Any) -> None:
        kernel, dims = kernel_of(part)[...], dims_of(part)
        sizes = [_product(kernel.shape, which) for which in (dims.inputs, dims.outputs)]
        rank, _ = self.config.size_of(place)
        if rank > min(sizes):
            raise ArgumentError(
                "`rank` must be at most the number of inputs and of outputs of a module with an adapter: no matrix has "
                f"a higher rank. Got {rank}, and {place} has {sizes[0]} inputs and {sizes[1]} outputs. Lower it, "
                f"or leave that module out of `targets` with '!{place}'.",
                "lora",
            )


def _parts(module: nnx.Module) -> Iterator[tuple[Key, Any]]:
    return ((tuple(key), part) for key, part in nnx.iter_modules(module, graph=True))


def _problem(part: Any) -> str | None:
    """Why a part cannot have an adapter, in words; None if it can."""
    if is_adapted(part):
        return _ADAPTED
    kind = kind_for(part)
    if kind is None:
        derived = next((base.__name__ for base in KINDS if isinstance(part, base)), None)
        return kind_of(part) if derived is None else f"{kind_of(part)}, which computes something else than {derived}"
    if hasattr(part, "lora"):
        return f"{kind_of(part)}, which has an attribute `lora` of its own"
    try:
        dims = dims_of(part)
    except ValueError as error:
        return f"{kind_of(part)}: {error}"
    return None if dims.inputs and dims.outputs else f"{kind_of(part)}, whose kernel has no inputs or no outputs"


def _product(shape: Sequence[int], which: Sequence[int]) -> int:
    size = 1
    for dim in which:
        size *= shape[dim]
    return size


def _few(names: Sequence[str], separator: str = ", ", most: int = 6) -> str:
    return separator.join([*names[:most], *["..."] * (len(names) > most)])


def _kinds() -> str:
    return ", ".join(dict.fromkeys(f"nnx.{kind.__name__}" for kind in KINDS))
