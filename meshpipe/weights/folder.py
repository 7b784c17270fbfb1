"""A folder of weights as `transformers` saves it: what model they are of, and reading them by leaf path."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import jax

from meshpipe.checkpoint.inspection import reader_of
from meshpipe.errors import ArgumentError
from meshpipe.files import expanded
from meshpipe.layers.shared import FACTORS
from meshpipe.models.model import ModelConfig
from meshpipe.weights.architectures import Table, dropouts, read_config, table_of
from meshpipe.weights.entry import Entry
from meshpipe.weights.errors import WeightsError, listed
from meshpipe.weights.fields import Fields
from meshpipe.weights.generation_settings import GENERATION_CONFIG, GenerationSettings
from meshpipe.weights.multimodal import is_other, text_fields, text_name
from meshpipe.weights.peft_adapters import PeftAdapters, base_of_adapters, is_adapters
from meshpipe.weights.quantised import WAY_OUT, are_quantised
from meshpipe.weights.reading import Source, check_dtype, read_leaves
from meshpipe.weights.tensor_file import Tensor, middle_bytes
from meshpipe.weights.tensor_folder import find_tensors

HERE = "Name a folder that is here; nothing is downloaded."
CONFIG, HEAD = "config.json", "lm_head.weight"
COMPANIONS = (
    CONFIG,
    GENERATION_CONFIG,
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
)
"""Files that go with weights and are copied as they are."""


def is_published(path: str | Path) -> bool:
    """Whether a folder is one of published weights, or of adapters, or is meant to be: no checkpoints, but files that
    such have.
    """
    folder = expanded("folder", path)
    if reader_of(folder).steps():
        return False
    return (folder / CONFIG).is_file() or any(folder.glob("*.safetensors")) or bool(_versions(folder))


def _versions(folder: Path) -> list[Path]:
    """The folders of weights in a folder of the cache of a hub, which has one for each version of a model."""
    return sorted(path.parent for path in folder.glob(f"snapshots/*/{CONFIG}"))


class WeightsFolder:
    """The weights in a folder with a config.json and files of safetensors; or adapters in a folder of PEFT, and the
    weights below them: in `base`, which messages call `argument`, or where adapter_config.json says.

    Raises `WeightsError`, a `ValueError`, when it is no such folder, when a file is damaged, or when meshpipe has no
    model like it. The tensors themselves are not read until `read`.
    """

    def __init__(self, path: str | Path, base: str | Path | None = None, argument: str = "base") -> None:
        self.folder = expanded("folder", path).absolute()
        if not self.folder.is_dir():
            raise WeightsError(f"Weights are read from a folder of files. Got {self.folder}, which is none. {HERE}")
        if not (self.folder / CONFIG).exists() and (versions := _versions(self.folder)):
            raise WeightsError(
                f"Weights are read from the folder of one version. Got {self.folder}, which has "
                f"{listed([str(path) for path in versions])}. Name one of them."
            )
        adapters = self.folder if is_adapters(self.folder) else None
        if adapters is not None:
            self.folder = base_of_adapters(adapters, base, argument).absolute()
        elif base is not None:
            raise ArgumentError(
                f"`{argument}` is for adapters. Got it with {self.folder}, which has none. Leave it out."
            )
        self.fields = text_fields(Fields.of_file(self.folder / CONFIG))
        self.model: ModelConfig = read_config(self.fields)
        self.table: Table = table_of(self.model)
        self.adapters = None if adapters is None else PeftAdapters(adapters, self.model)
        """The adapters upon the weights, if there are any."""

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """By name as the table has them: with the prefix that some files leave out, and without that of a larger model,
        which sees as well.
        """
        found = {text_name(name): tensor for name, tensor in find_tensors(self.folder).items()}
        prefix = self.table.prefix
        names = {entry.name for entry in self.table.entries}
        return {
            prefix + name if name not in names and prefix + name in names else name: tensor
            for name, tensor in found.items()
        }

    @property
    def dtype(self) -> str:
        """That of all tensors that are read; float32 where they have several. Without any, as a config.json is enough
        to plan a run, it is what that says.
        """
        if not any(self.folder.glob("*.safetensors")):
            return str(self.fields.values.get("dtype") or self.fields.values.get("torch_dtype") or "float32")
        used = {self.tensors[entry.name].dtype for entry in self.table.entries if entry.name in self.tensors}
        return str(used.pop()) if len(used) == 1 else "float32"

    @property
    def param_dtype(self) -> Literal["float32", "bfloat16"]:
        """The shortest dtype of parameters that keeps every value."""
        return "bfloat16" if self.dtype == "bfloat16" else "float32"

    def rounded_to(self, param_dtype: str) -> str:
        """What is lost when parameters are of this dtype, as a sentence; empty where nothing is."""
        lossless = param_dtype != "bfloat16" or self.param_dtype == "bfloat16"
        return "" if lossless else f"Its {self.dtype} weights are rounded to bfloat16."

    @property
    def without_dropout(self) -> str:
        """What training leaves out of what config.json says, as a sentence; empty where there is nothing."""
        rates = ", ".join(f"{name} {rate:g}" for name, rate in dropouts(self.fields).items())
        return f"Training is without the dropout of its config.json ({rates})." if rates else ""

    @cached_property
    def generation(self) -> GenerationSettings:
        """What the folder says of generating."""
        return GenerationSettings.of(self.folder, self.model)

    @property
    def unused(self) -> Sequence[str]:
        """Tensors that are not read: buffers that are computed here, a head that is tied to the embedding, and what is
        not of the model of text.
        """
        return sorted(name for name in self.tensors if self._is_known_extra(name))

    @property
    def files(self) -> Sequence[Path]:
        """The small files that go with the weights: config, tokenizer, chat template."""
        return [self.folder / name for name in COMPANIONS if (self.folder / name).is_file()]

    @property
    def place(self) -> str:
        """Where the weights are, in words."""
        return str(self.folder) if self.adapters is None else f"{self.adapters.folder} upon {self.folder}"

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors that are read."""
        return sum(self.tensors[name].nbytes for name in {e.name for e in self.table.entries} if name in self.tensors)

    @property
    def leaves(self) -> Sequence[str]:
        """The paths of all leaves of the model."""
        adapters = () if self.adapters is None else self.adapters.leaves
        return [*(entry.path for entry in self.table.entries), *self.table.tied, *adapters]

    def outline(self) -> str:
        """A digest of config.json, of what tensors there are, and of a few bytes of each, for processes to compare: the
        bytes tell versions of one model apart, without reading it.
        """
        known = {
            name: [str(tensor), tensor.file.name, tensor.offset, middle_bytes(tensor).hex()]
            for name, tensor in self.tensors.items()
        }
        adapters = None if self.adapters is None else self.adapters.outline
        text = json.dumps([self.fields.values, known, adapters], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def check(self, leaves: Mapping[str, Any], *, whole: bool = True) -> None:
        """Raises `WeightsError` unless the tensors are those of a model with these leaves, which have a shape and a
        dtype: every leaf must have a tensor and, if the leaves are `whole`, every tensor a leaf.
        """
        if self.adapters is not None and whole:
            self.adapters.check({path: leaf for path, leaf in leaves.items() if path.endswith(FACTORS)})
            leaves = {path: leaf for path, leaf in leaves.items() if not path.endswith(FACTORS)}
        problems: list[str] = []
        entries = {entry.path: entry for entry in self.table.entries}
        wanted = {path: entries.get(self.table.tied.get(path, path)) for path in leaves}
        if strange := sorted(path for path, entry in wanted.items() if entry is None):
            problems.append(f"the folder's model has no {listed(strange)}")
        needed = {path: entry for path, entry in wanted.items() if entry is not None}
        missing = sorted({entry.name for entry in needed.values() if entry.name not in self.tensors})
        if missing:
            problems.append(f"it has no {listed(missing)}")
        known = {entry.name for entry in needed.values()}
        extra = sorted(name for name in self.tensors if name not in known and not self._is_known_extra(name))
        if whole and extra:
            problems.append(f"the model has no use for {listed(extra)}")
        problems += self._shape_problems(needed, leaves)
        if problems:
            way_out = "Give the model the sizes of its config.json, or name the folder of that model."
            if are_quantised(self.tensors):
                way_out = WAY_OUT
            elif missing == [HEAD] and len(problems) == 1:
                way_out = "If its head is its embedding, set `tie_word_embeddings` to true in its config.json."
            raise WeightsError(
                f"The tensors of a folder must be those of the model. Got {self.folder}: {'; '.join(problems)}. "
                f"{way_out}"
            )
        self._check_tied(needed)
        for path, entry in needed.items():
            check_dtype(entry.name, self.tensors[entry.name], leaves[path].dtype)

    def _check_tied(self, entries: Mapping[str, Entry]) -> None:
        """Raises `WeightsError` for a head of its own, in the folder of a model that ties it to the embedding."""
        head = self.tensors.get(HEAD)
        for path in self.table.tied if head is not None else ():
            entry = entries.get(path)
            if entry is None or entry.name == HEAD:
                continue
            assert head is not None
            embedding = self.tensors[entry.name]
            is_same = head.shape == embedding.shape and (
                head.dtype != embedding.dtype or middle_bytes(head, 4096) == middle_bytes(embedding, 4096)
            )
            if not is_same:
                raise WeightsError(
                    f"A head that is tied to the embedding must have its values. Got {self.folder}, where {HEAD} has "
                    f"others than {entry.name}. Set `tie_word_embeddings` to false in its config.json to use the head, "
                    f"or leave {HEAD} out of the files."
                )

    def read(self, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
        """The leaves `wanted`, by leaf path, with their shardings and in their dtypes; those without a device in this
        process are left out. Only the parts that this process holds are read. Raises `WeightsError` as `check` does.
        """
        found = {}
        if self.adapters is not None:
            found = self.adapters.read({path: leaf for path, leaf in wanted.items() if path in self.adapters.leaves})
            wanted = {path: leaf for path, leaf in wanted.items() if path not in self.adapters.leaves}
        return found | read_leaves(self.sources(wanted), wanted)

    def sources(self, wanted: Mapping[str, Any]) -> dict[str, Source]:
        """What each of the leaves is read from. Raises as `check` does."""
        entries = {entry.path: entry for entry in self.table.entries}
        sources = {}
        for path, shape in wanted.items():
            entry = entries.get(self.table.tied.get(path, path))
            if entry is None or entry.name not in self.tensors:
                raise WeightsError(f"{self.folder} has nothing for {path}. Its model has other sizes.")
            tensor = self.tensors[entry.name]
            if problem := _shape_problem(entry, tensor, shape.shape):
                raise WeightsError(f"Tensors must have the shapes of the model. Got {self.folder}, where {problem}.")
            check_dtype(entry.name, tensor, shape.dtype)
            sources[path] = Source(entry, tensor)
        return sources

    def _shape_problems(self, entries: Mapping[str, Entry], leaves: Mapping[str, Any]) -> list[str]:
        found = [
            problem
            for path, entry in entries.items()
            if entry.name in self.tensors
            if (problem := _shape_problem(entry, self.tensors[entry.name], leaves[path].shape))
        ]
        found = list(dict.fromkeys(found))  # a tied tensor is that of two leaves
        return [] if not found else ["; ".join(found[:3]) + (f"; {len(found) - 3} more" if len(found) > 3 else "")]

    def _is_known_extra(self, name: str) -> bool:
        # Some files have the head of a model that ties it to the embedding.
        of_head = name == HEAD and bool(self.table.tied)
        return of_head or name.endswith(self.table.unused) or is_other(name)


def _shape_problem(entry: Entry, tensor: Tensor, leaf_shape: Sequence[int]) -> str | None:
    dims = entry.dims.partition("->")[2].split()
    if dims and len(dims) != len(leaf_shape):
        return f"{entry.name} is {list(tensor.shape)}, and {entry.path} is {list(leaf_shape)}"
    needed = entry.tensor_shape(leaf_shape)
    return None if needed == tensor.shape else f"{entry.name} is {list(tensor.shape)}, and the model's {list(needed)}"
