"""Folders as people have them: with tensors that nothing needs, older fields, and models that see as well."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import golden
import jax
import ml_dtypes
import numpy as np
import pytest

from meshpipe.exchange.exporting import export_weights
from meshpipe.exchange.importing import import_weights
from meshpipe.models import sizes
from meshpipe.models.language_model import WindowConfig
from meshpipe.weights import WeightsFolder, is_published
from meshpipe.weights.architectures import differences
from meshpipe.weights.writing import Outline, write_file

Tensors = dict[str, np.ndarray]


def folder_of(
    name: str, to: Path, config: dict[str, Any], tensors: Callable[[Tensors], Tensors] = lambda found: found
) -> WeightsFolder:
    """A golden folder with fields of its config.json changed, or left out where they are `...`, and other tensors."""
    to.mkdir()
    values = {**json.loads((golden.FOLDER / name / "config.json").read_text()), **config}
    (to / "config.json").write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))
    made = tensors(golden.tensors(name))
    outlines = [Outline(key, value.shape, value.dtype) for key, value in made.items()]
    write_file(to / "model.safetensors", outlines, lambda key: made[key])
    return WeightsFolder(to)


def with_buffers(found: Tensors) -> Tensors:
    return found | {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}


def with_head(found: Tensors) -> Tensors:
    return found | {"lm_head.weight": found["model.embed_tokens.weight"]}


def same(found: Tensors) -> Tensors:
    return found


def as_type(dtype: Any) -> Callable[[Tensors], Tensors]:
    return lambda found: {key: value.astype(dtype) for key, value in found.items()}


def without_prefix(prefix: str) -> Callable[[Tensors], Tensors]:
    return lambda found: {key.removeprefix(prefix): value for key, value in found.items()}


YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_slow": 0.05}
CASES: list[tuple[str, dict[str, Any], Callable[[Tensors], Tensors]]] = [
    ("llama3", {}, with_buffers),
    ("llama3", {}, with_head),
    ("llama3", {"torch_dtype": ..., "pretraining_tp": 1, "rope_theta": 500_000}, same),
    ("llama3", {}, as_type(ml_dtypes.bfloat16)),
    ("llama3", {}, as_type(np.float16)),
    ("llama3", {}, as_type(ml_dtypes.float8_e4m3fn)),
    ("llama3", {}, without_prefix("model.")),
    ("gpt2", {}, without_prefix("transformer.")),
    ("gpt2", {}, lambda found: found | {"lm_head.weight": found["transformer.wte.weight"]}),
    ("gpt2", {}, lambda found: found | {"transformer.h.0.attn.bias": np.ones((1, 1, 8, 8), np.float32)}),
    ("qwen2", {"use_sliding_window": False, "sliding_window": 32, "layer_types": ..., "max_window_layers": 1}, same),
    ("qwen2", {"dtype": ..., "rope_scaling": None, "rope_parameters": {"rope_type": "default"}}, same),
    ("gemma2", {"layer_types": ..., "hidden_act": "gelu", "cache_implementation": "hybrid"}, same),
    ("qwen3_yarn", {"rope_parameters": ..., "rope_theta": 100.0, "rope_scaling": YARN}, same),
]


@pytest.mark.parametrize(("name", "config", "tensors"), CASES)
def test_the_model_and_its_leaves_are_found(name: str, config: Any, tensors: Any, tmp_path: Path) -> None:
    weights = folder_of(name, tmp_path / "odd", config, tensors)
    assert weights.model == golden.CONFIGS[name]
    weights.check({path: jax.ShapeDtypeStruct(leaf.shape, np.float32) for path, leaf in golden.leaves(name).items()})


def test_a_snapshot_of_links_as_in_the_cache_of_a_hub(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots/main"
    shutil.copytree(golden.FOLDER / "mistral", blobs)
    snapshot.mkdir(parents=True)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    assert WeightsFolder(snapshot).tensors.keys() == golden.tensors("mistral").keys()
    assert is_published(tmp_path)
    with pytest.raises(ValueError, match=r"has .*/snapshots/main\. Name one of them"):
        WeightsFolder(tmp_path)
    import_weights(snapshot, tmp_path / "imported")
    export_weights(tmp_path / "imported", tmp_path / "exported")
    assert WeightsFolder(tmp_path / "exported").tensors.keys() == golden.tensors("mistral").keys()


def test_dropout_is_said_to_be_left_out(tmp_path: Path) -> None:
    gpt2 = folder_of("gpt2", tmp_path / "gpt2", {"embd_pdrop": 0.0})
    told = "Training is without the dropout of its config.json (attn_pdrop 0.1, resid_pdrop 0.1)."
    assert gpt2.without_dropout == told
    assert not WeightsFolder(golden.FOLDER / "llama3").without_dropout


def test_the_windows_of_mistral_and_qwen(tmp_path: Path) -> None:
    without = folder_of("mistral", tmp_path / "mistral", {"sliding_window": None}).model
    assert getattr(without, "window", None) == WindowConfig()
    changes = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0, "layer_types": ...}
    every = folder_of("qwen2", tmp_path / "qwen2", changes).model
    assert getattr(every, "window", None) == WindowConfig(size=5)


@pytest.mark.parametrize("layout", ["language_model.model.", "model.language_model."])
def test_the_text_of_a_model_that_sees(layout: str, tmp_path: Path) -> None:
    """As Gemma 3 is published from 4 billion parameters on, in files of older and newer versions of transformers."""
    text = json.loads((golden.FOLDER / "gemma3/config.json").read_text())

    def renamed(found: Tensors) -> Tensors:
        made = {key.replace("model.", layout, 1): value for key, value in found.items()}
        vision = "vision_tower.vision_model.embeddings.patch_embedding.weight"
        return made | {vision: np.ones((2, 3), np.float32), "multi_modal_projector.x": np.ones(2, np.float32)}

    whole = dict.fromkeys(text, ...) | {"model_type": "gemma3", "text_config": text, "eos_token_id": [1, 106]}
    weights = folder_of("gemma3", tmp_path / "sees", whole, renamed)
    assert weights.model == golden.CONFIGS["gemma3"]
    assert len(weights.unused) == 2
    if layout != "model.language_model.":
        return
    import_weights(tmp_path / "sees", tmp_path / "imported")
    export_weights(tmp_path / "imported", tmp_path / "exported")
    assert json.loads((tmp_path / "exported/config.json").read_text())["model_type"] == "gemma3_text"
    exported, expected = WeightsFolder(tmp_path / "exported"), golden.tensors("gemma3")
    data = (tmp_path / "exported/model.safetensors").read_bytes()
    assert exported.tensors.keys() == expected.keys()
    for key, tensor in exported.tensors.items():
        assert data[tensor.offset : tensor.offset + tensor.nbytes] == expected[key].tobytes()


def test_the_fields_that_a_model_that_sees_leaves_out(tmp_path: Path) -> None:
    """The config.json of the 4 billion parameters has these fields alone."""
    shutil.copytree(golden.FOLDER / "gemma3", tmp_path / "sees")
    text = {
        "hidden_size": 2560,
        "intermediate_size": 10_240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    }
    (tmp_path / "sees/config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": text}))
    assert not differences(sizes.gemma3_4b(), WeightsFolder(tmp_path / "sees").model)
