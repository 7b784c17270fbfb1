"""The fields of a config.json, each read as what it must be."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from meshpipe.documents import DamagedFileError, load_json
from meshpipe.errors import is_number
from meshpipe.weights.errors import WeightsError

_Value = TypeVar("_Value")
_MISSING = object()
_MOST_BLOCKS = 1_000


@dataclass(frozen=True)
class Fields:
    """A JSON object from a file, which anybody may have written."""

    values: Mapping[str, Any]
    place: str
    """Where it stands, for messages."""

    @classmethod
    def of_file(cls, file: Path) -> "Fields":
        """Raises `WeightsError` when the file is missing or no JSON object."""
        try:
            values = load_json(file.resolve(), 1 << 24)
        except FileNotFoundError:
            raise WeightsError(
                f"A folder of weights must have a {file.name}, which says what model they are of. Got {file.parent}, "
                "which has none. Name the folder that `save_pretrained` made or that was downloaded."
            ) from None
        except DamagedFileError as error:
            raise WeightsError(f"{file.name} must be JSON. Got {file}: it {error}. Copy it again.") from None
        if not isinstance(values, dict):
            raise WeightsError(f"{file.name} must be a JSON object. Got {file}, which holds {values!r:.60}.")
        return cls(values, str(file))

    def size(self, name: str, default: Any = _MISSING, most: int = 1 << 31) -> int:
        """A whole number of at least 1. More than `most` would only keep the machine busy before it fails."""
        value = self._value(name, default)
        if type(value) is not int or value < 1:
            raise self.wrong(name, "a whole number of at least 1")
        if value > most:
            raise self.wrong(name, f"at most {most}")
        return value

    def blocks(self, name: str) -> int:
        """A number of blocks, each of which takes time and memory before a tensor is read."""
        return self.size(name, most=_MOST_BLOCKS)

    def number(self, name: str, default: Any = _MISSING) -> float:
        value = self._value(name, default)
        if not is_number(value):
            raise self.wrong(name, "a number of at least 0")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self._value(name, default)
        if not isinstance(value, bool):
            raise self.wrong(name, "true or false")
        return value

    def optional_number(self, name: str) -> float | None:
        return None if self.values.get(name) is None else self.number(name)

    def optional_size(self, name: str) -> int | None:
        return None if self.values.get(name) is None else self.size(name)

    def choice(self, name: str, choices: Mapping[str, _Value], default: str) -> _Value:
        value = self._value(name, default)
        if not isinstance(value, str) or value not in choices:
            raise self.wrong(name, " or ".join(choices))
        return choices[value]

    def must_be(self, name: str, *allowed: Any) -> None:
        """Raises `WeightsError` for a field that is there and would change what the model computes."""
        value = self.values.get(name)
        if value is not None and value not in allowed:
            raise self.wrong(name, " or ".join(_spell(known) for known in allowed) or "left out")

    def nested(self, name: str) -> "Fields | None":
        value = self.values.get(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.wrong(name, "an object")
        return Fields(value, f"{name} of {self.place}")

    def names(self, name: str) -> Sequence[str] | None:
        value = self.values.get(name)
        if value is not None and not (isinstance(value, list) and all(isinstance(v, str) for v in value)):
            raise self.wrong(name, "a list of names")
        return value

    def wrong(self, name: str, rule: str) -> WeightsError:
        got = _spell(self.values.get(name)) if name in self.values else "none"
        return WeightsError(f"`{name}` of a model that meshpipe computes must be {rule}. Got {got} in {self.place}.")

    def _value(self, name: str, default: Any) -> Any:
        value = self.values.get(name)
        if value is None and default is _MISSING:
            raise WeightsError(f"{self.place} must have `{name}`. It has none.")
        return default if value is None else value


def _spell(value: Any) -> str:
    return {True: "true", False: "false"}[value] if isinstance(value, bool) else repr(value)[:80]
