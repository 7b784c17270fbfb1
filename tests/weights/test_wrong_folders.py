"""Wrong folders of weights: the rule, what was got, the way out; and nothing written."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import golden
import numpy as np
import pytest

from meshpipe.checkpoint.chunks import whole
from meshpipe.cli import main
from meshpipe.weights.tensor_file import read_header, read_part
from meshpipe.weights.writing import Outline, write_file

Tensors = dict[str, np.ndarray]


def config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        values = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**values, **changes}))

    return change


def bytes_of(change: Callable[[bytes], bytes], name: str = "model.safetensors") -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / name).write_bytes(change((folder / name).read_bytes()))

    return write


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def renamed(old: str, new: str) -> Callable[[Path], None]:
    """A header with another name of a tensor, of as many letters."""
    return bytes_of(lambda data: data.replace(old.encode(), new.encode(), 1))


def with_tensors(change: Callable[[Tensors], Tensors], name: str = "model.safetensors") -> Callable[[Path], None]:
    """Other tensors in a file of the folder."""

    def write(folder: Path) -> None:
        file = folder / name
        held = {key: read_part(tensor, tensor.shape, whole(tensor.shape)) for key, tensor in read_header(file).items()}
        made = change(held)
        file.unlink()
        write_file(file, [Outline(key, value.shape, value.dtype) for key, value in made.items()], lambda key: made[key])

    return write


def quantised(made: Tensors) -> Tensors:
    """As GPTQ has them."""
    key = "model.layers.0.mlp.down_proj"
    rest = {name: value for name, value in made.items() if name != f"{key}.weight"}
    return rest | {f"{key}.qweight": np.zeros((4, 16), np.int32), f"{key}.scales": np.ones((1, 16), np.float16)}


def as_bytes(made: Tensors) -> Tensors:
    return {key: value.astype(np.int8) if key.endswith("down_proj.weight") else value for key, value in made.items()}


def twice(folder: Path) -> None:
    """A tensor of the first file in the last one too, with other values."""
    first, last = (folder / f"model-0000{number}-of-00004.safetensors" for number in (1, 4))
    name, tensor = next(iter(read_header(first).items()))
    with_tensors(lambda made: made | {name: np.full(tensor.shape, 7, tensor.dtype)}, last.name)(folder)


def left_out(folder: Path) -> None:
    name = "model-00004-of-00004.safetensors"
    with_tensors(lambda made: made | {"model.extra.weight": np.ones(3, np.float32)}, name)(folder)


CASES: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "no config.json": ("llama3", without("config.json"), "must have a config.json"),
    "config.json is no JSON": ("llama3", lambda f: (f / "config.json").write_text("{"), "config.json must be JSON"),
    "an unknown architecture": ("llama3", config(model_type="mamba"), "must be one of llama, mistral"),
    "no hidden_size": ("llama3", config(hidden_size=None), "must have `hidden_size`"),
    "a size that is a text": ("llama3", config(hidden_size="16"), "must be a whole number of at least 1. Got '16'"),
    "biases of attention": (
        "llama3",
        config(attention_bias=True),
        "`attention_bias` of a model",
    ),
    "another activation": ("llama3", config(hidden_act="relu"), "must be silu. Got 'relu'"),
    "another scaling": (
        "llama3",
        config(rope_scaling={"rope_type": "longrope"}),
        "must be default or linear or llama3 or yarn",
    ),
    "dynamic scaling": (
        "llama3",
        config(rope_scaling={"type": "dynamic", "factor": 2.0}),
        "must be stretched alike for all texts",
    ),
    "quantised by a config": (
        "llama3",
        config(quantization_config={"quant_method": "gptq", "bits": 4}),
        "Got `quantization_config` of the method 'gptq'",
    ),
    "quantised by its tensors": ("llama3", with_tensors(quantised), "Quantised weights are not read: take the folder"),
    "bytes for weights": ("llama3", with_tensors(as_bytes), "down_proj.weight in"),
    "a scaling of no kind": (
        "llama3",
        config(rope_scaling={"rope_type": None, "factor": 2.0}),
        "must name its kind, as `rope_type`",
    ),
    "a head that is not the tied embedding": (
        "llama3",
        with_tensors(lambda made: made | {"lm_head.weight": 2 * made["model.embed_tokens.weight"]}),
        "Set `tie_word_embeddings` to false",
    ),
    "no head": ("llama3", config(tie_word_embeddings=False), "set `tie_word_embeddings` to true"),
    "a tensor of two values": ("mistral", twice, "A tensor must have one value. Got "),
    "a tensor that the index leaves out": ("mistral", left_out, "the model has no use for model.extra.weight"),
    "an uneven pattern of windows": (
        "gemma3",
        config(layer_types=["full_attention", "sliding_attention", "full_attention", "sliding_attention"]),
        "`layer_types` of a model",
    ),
    "no tensors": ("llama3", without("model.safetensors"), "which has none. Download"),
    "a part is missing": ("mistral", without("model-00003-of-00004.safetensors"), "lacks model-00003-of-00004"),
    "no index": ("mistral", without("model.safetensors.index.json"), "need their index"),
    "an index that leads elsewhere": (
        "mistral",
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../a"}}'),
        "must have a `weight_map`",
    ),
    "a truncated file": ("llama3", bytes_of(lambda data: data[:-8]), "it is truncated. Download"),
    "a file without its header": ("llama3", bytes_of(lambda data: data[:4]), "too few for a header"),
    "a header that is too large": ("llama3", bytes_of(lambda data: b"\xff" * 8 + data[8:]), "more than the 100000000"),
    "an unknown dtype": ("llama3", renamed('"F32"', '"Q99"'), "which is not known here"),
    "two tensors in one place": (
        "llama3",
        renamed('"data_offsets":[43264,43328]', '"data_offsets":[43200,43264]'),
        "begins at byte",
    ),
    "bytes after the last tensor": ("llama3", bytes_of(lambda data: data + b"abc"), "ends at byte"),
    "a list for a name": ("llama3", config(hidden_act=["silu"]), "must be silu. Got ['silu']"),
    "a negative number": ("llama3", config(rope_theta=-5.0), "must be a number of at least 0. Got -5.0"),
    "more blocks than anybody has": ("llama3", config(num_hidden_layers=10**9), "must be at most 1000. Got 10000000"),
    "a width that no machine holds": ("llama3", config(hidden_size=10**30), "`hidden_size` of a model"),
    "heads that do not divide": (
        "llama3",
        config(num_key_value_heads=3),
        "config.json must describe a model that can be: `num_heads` must be a multiple of `num_kv_heads`",
    ),
    "a tensor is missing": (
        "llama3",
        renamed("layers.1.mlp.up_proj", "layers.1.mlp.xx_proj"),
        "no model.layers.1.mlp.up_",
    ),
    "too many blocks": ("llama3", config(num_hidden_layers=3), "it has no model.layers.2."),
    "another vocabulary": ("llama3", config(vocab_size=300), "weight is [288, 16], and the model's [300, 16]. Give"),
    "another width": ("llama3", config(intermediate_size=48), "and the model's [48, 16]"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_wrong_is_said(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name, change, message = CASES[case]
    monkeypatch.chdir(tmp_path)
    shutil.copytree(golden.FOLDER / name, "weights")
    change(Path("weights"))
    assert main(["weights", "import", "weights", "--to", "new"]) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["weights"]


def test_folders_that_are_not_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["weights", "import", str(golden.FOLDER / "gpt2"), "--to", "new"]) == 0
    assert main(["weights", "import", str(golden.FOLDER / "gpt2"), "--to", "new"]) == 2
    assert "must be a folder without checkpoints" in capsys.readouterr().err
    shutil.copytree(golden.FOLDER / "gpt2", "weights")
    assert main(["weights", "import", "weights", "--to", "weights"]) == 2
    assert "must be another folder than that of the weights" in capsys.readouterr().err
    assert main(["weights", "export", "new", "--to", "new"]) == 2
    assert "must be a folder that is not there or empty" in capsys.readouterr().err
    assert main(["weights", "export", "nowhere", "--to", "out"]) == 2
    capsys.readouterr()
    assert main(["weights", "export", "new", "--to", "out", "--like", str(golden.FOLDER / "llama3")]) == 2
    assert "must describe their model. Got" in capsys.readouterr().err
    assert main(["weights", "export", "new", "--to", "out", "--base", str(golden.FOLDER / "gpt2")]) == 2
    assert "--base is for checkpoints of adapters" in capsys.readouterr().err
    assert not Path("out").exists()
