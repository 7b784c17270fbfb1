"""How PEFT names adapters: the modules of transformers, and the modules here that they are."""

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from meshpipe.models.model import ModelConfig
from meshpipe.weights.architectures import table_of
from meshpipe.weights.errors import WeightsError
from meshpipe.weights.multimodal import text_name

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
KERNEL = "/kernel"
FACTORS: Mapping[str, str] = {"lora_A": "lora/lora_a", "lora_B": "lora/lora_b"}
"""The factors of an adapter in PEFT, and the leaves below a module that they are."""


@dataclass(frozen=True)
class PeftModule:
    """A linear module of transformers, of which a module here is all or a part."""

    name: str
    part: int
    """Which of the parts of the outputs, that lie side by side."""
    parts: int
    """How many there are: three in GPT-2's queries, keys and values."""


def modules_of(model: ModelConfig) -> dict[str, PeftModule]:
    """By path of each module that PEFT adapts, alone or with others, what it is in transformers."""
    kernels = [entry for entry in table_of(model).entries if entry.path.endswith(KERNEL)]
    parts = Counter(entry.name for entry in kernels)
    return {
        entry.path.removesuffix(KERNEL): PeftModule(entry.name.removesuffix(".weight"), entry.part, parts[entry.name])
        for entry in kernels
    }


_PREFIX = "base_model.model."


def tensor_name(module: str, factor: str) -> str:
    """The name of a factor in the file of adapters."""
    return f"{_PREFIX}{module}.{factor}.weight"


def text_tensor(name: str) -> str:
    """The name that a factor has in a file of adapters of the model of text, where it is of one that sees as well."""
    return _PREFIX + text_name(name.removeprefix(_PREFIX)) if name.startswith(_PREFIX) else name


def check_modules(model: ModelConfig, adapted: Collection[str]) -> None:
    """Raises `WeightsError` for the path of a module with an adapter that PEFT has none for."""
    known = modules_of(model)
    for path in sorted(adapted):
        if path in known:
            continue
        names = [entry.name for entry in table_of(model).entries if entry.path.startswith(f"{path}/")]
        what = f"the embedding {names[0]}, which PEFT adapts by other factors" if names else "which no tensor is"
        raise WeightsError(
            f"Adapters are exported where PEFT has one as well. Got one at {path}, {what}. Export the weights with "
            "the adapters merged into them."
        )


def target_modules(model: ModelConfig, adapted: Collection[str]) -> list[str]:
    """The ends of names by which PEFT finds the adapted modules and no others; a whole name where no end does."""
    every = modules_of(model)
    linear = {name.removesuffix(".weight") for name in (entry.name for entry in table_of(model).entries)}
    chosen = {every[path].name for path in adapted}
    found: set[str] = set()
    for name in chosen:
        words = name.split(".")
        ends = (".".join(words[-count:]) for count in (1, 2))
        fits = (end for end in ends if {n for n in linear if f".{n}".endswith(f".{end}")} <= chosen)
        found.add(next(fits, name))
    return sorted(found)


def patterns_of(chosen: Collection[str], among: Collection[str]) -> tuple[str, ...]:
    """Patterns that match these paths of modules and no others of those that there are."""

    def end(path: str) -> str:
        return path.split("/", 2)[2]

    every, own = Counter(map(end, among)), Counter(map(end, chosen))
    return tuple(sorted({end(path) if own[end(path)] == every[end(path)] else path for path in chosen}))
