"""Adapters go in and out as PEFT has them."""

import json
from pathlib import Path

import golden
import jax.numpy as jnp
import numpy as np
import pytest

from meshpipe import Checkpointer, load
from meshpipe.adapters.config import LoraConfig
from meshpipe.cli import main
from meshpipe.exchange.exporting_adapters import export_adapters
from meshpipe.exchange.importing import import_weights
from meshpipe.exchange.peft_factors import peft_factors
from meshpipe.generation.saved import open_saved
from meshpipe.weights import WeightsFolder
from meshpipe.weights.tensor_file import read_header
from meshpipe.weights.writing import Outline, write_file

RANK = 2
SHAPES = {
    "llama3": {"model.layers.{}.self_attn.q_proj": (16, 32), "model.layers.{}.self_attn.o_proj": (32, 16)},
    "gpt2": {
        "transformer.h.{}.attn.c_attn": (16, 48),
        "transformer.h.{}.attn.c_proj": (16, 16),
        "transformer.h.{}.mlp.c_fc": (16, 64),
    },
}
"""By module, its inputs and outputs."""


def adapters(name: str, folder: Path, **changes: object) -> dict[str, np.ndarray]:
    """Writes a folder as PEFT does, with random factors."""
    rng, made = np.random.default_rng(0), {}
    for module, (inputs, outputs) in SHAPES[name].items():
        for block in range(2):
            start = f"base_model.model.{module.format(block)}"
            made[f"{start}.lora_A.weight"] = rng.normal(0, 0.3, (RANK, inputs)).astype(np.float32)
            made[f"{start}.lora_B.weight"] = rng.normal(0, 0.3, (outputs, RANK)).astype(np.float32)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(golden.FOLDER / name),
        "r": RANK,
        "lora_alpha": 3,
        "use_rslora": name == "gpt2",
        "target_modules": [".".join(module.split(".")[-2:]) for module in SHAPES[name]],
        "fan_in_fan_out": name == "gpt2",
        **changes,
    }
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config))
    write_tensors(folder, made)
    return made


def write_tensors(folder: Path, made: dict[str, np.ndarray]) -> None:
    file = folder / "adapter_model.safetensors"
    file.unlink(missing_ok=True)
    write_file(file, [Outline(name, value.shape, value.dtype) for name, value in made.items()], lambda name: made[name])


def tensors(folder: Path) -> dict[str, bytes]:
    file = folder / "adapter_model.safetensors"
    data = file.read_bytes()
    return {name: data[t.offset : t.offset + t.nbytes] for name, t in read_header(file).items()}


@pytest.mark.parametrize("name", SHAPES)
def test_adapters_keep_every_bit(name: str, tmp_path: Path) -> None:
    made = adapters(name, tmp_path / "peft")
    import_weights(tmp_path / "peft", tmp_path / "imported")
    found = WeightsFolder(tmp_path / "peft").adapters
    assert found is not None
    lora = found.lora
    assert (lora.rank, lora.alpha, lora.rank_stabilised) == (RANK, 3.0, name == "gpt2")
    assert open_saved(tmp_path / "imported").lora == lora
    modules = load(tmp_path / "imported", layers="recipe")
    leaves = load(tmp_path / "imported")
    assert len(modules) == 4
    for path, leaf in golden.leaves(name).items():
        np.testing.assert_array_equal(leaves[path], leaf, err_msg=path)
    export_adapters(tmp_path / "imported", tmp_path / "half", dtype="bfloat16")
    assert {str(tensor.dtype) for tensor in read_header(tmp_path / "half/adapter_model.safetensors").values()} == {
        "bfloat16"
    }
    assert export_adapters(tmp_path / "imported", tmp_path / "out") == (4 if name == "llama3" else 10)
    assert tensors(tmp_path / "out") == {key: value.tobytes() for key, value in made.items()}
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    short = {"llama3": ["o_proj", "q_proj"], "gpt2": ["attn.c_proj", "c_attn", "c_fc"]}
    assert config["target_modules"] == short[name]
    before = json.loads((tmp_path / "peft/adapter_config.json").read_text())
    assert {key: config[key] for key in before if key != "target_modules"} == {
        key: value for key, value in before.items() if key != "target_modules"
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank_pattern": {"q_proj": 4}}, "`rank_pattern`"),
        ({"modules_to_save": ["lm_head"]}, "`modules_to_save`"),
        ({"use_dora": True}, "`use_dora`"),
        ({"bias": "all"}, "`bias`"),
        ({"peft_type": "IA3"}, "`peft_type`"),
        ({"base_model_name_or_path": "nowhere/model"}, "Pass that folder as `base`"),
        ({"r": 3}, "must have the shape"),
    ],
)
def test_adapters_that_are_not_computed(changes: dict[str, object], message: str, tmp_path: Path) -> None:
    adapters("llama3", tmp_path / "peft", **changes)
    with pytest.raises(ValueError, match=message):
        import_weights(tmp_path / "peft", tmp_path / "imported")
    assert not (tmp_path / "imported").exists()


def test_tensors_without_a_place(tmp_path: Path) -> None:
    made = adapters("llama3", tmp_path / "peft")
    write_tensors(
        tmp_path / "peft", {**made, "base_model.model.model.embed_tokens.lora_embedding_A": np.ones((2, 288))}
    )
    with pytest.raises(ValueError, match="lora_embedding_A"):
        import_weights(tmp_path / "peft", tmp_path / "imported")
    first = next(iter(made))
    write_tensors(tmp_path / "peft", {key: value for key, value in made.items() if key != first})
    with pytest.raises(ValueError, match=f"without {first}"):
        import_weights(tmp_path / "peft", tmp_path / "imported")
    assert not (tmp_path / "imported").exists()


def test_parts_with_adapters_of_their_own_are_blocks() -> None:
    """Queries, keys and values whose A differ, or that do not all have an adapter."""
    model, rng = golden.CONFIGS["gpt2"], np.random.default_rng(0)
    for parts in (("query", "key", "value"), ("query", "value")):
        lora = LoraConfig(rank=RANK, alpha=3.0, rank_stabilised=len(parts) == 2)
        leaves, expected = {}, np.zeros((16, 48), np.float32)
        for part in parts:
            a, b = rng.normal(size=(16, RANK)), rng.normal(size=(RANK, 16))
            path = f"layers/1/attention/{part}/lora"
            leaves |= {f"{path}/lora_a": a.astype("f4"), f"{path}/lora_b": b.astype("f4").reshape(RANK, 4, 4)}
            start = 16 * ("query", "key", "value").index(part)
            expected[:, start : start + 16] = a @ b * lora.alpha / (RANK**0.5 if lora.rank_stabilised else RANK)
        found, module = peft_factors(model, lora, leaves), "transformer.h.0.attn.c_attn"
        rank, alpha = found.rank_pattern[module], found.alpha_pattern[module]
        a, b = (found.tensors[f"base_model.model.{module}.lora_{factor}.weight"] for factor in "AB")
        assert rank == len(a) == RANK * len(parts)
        scale = alpha / (rank**0.5 if lora.rank_stabilised else rank)
        np.testing.assert_allclose((b @ a).T * scale, expected, atol=1e-5)


def changed(imported: Path, to: Path) -> None:
    """A checkpoint as training leaves it: every factor differs."""
    rng = np.random.default_rng(1)
    leaves = {
        path: leaf + (rng.normal(0, 0.1, leaf.shape) if "/lora/" in path else 0)
        for path, leaf in load(imported).items()
    }
    metadata = {**Checkpointer(imported).metadata(0), "step": 1}
    with Checkpointer(to) as checkpointer:
        checkpointer.save(1, [{"params": {path: jnp.asarray(leaf, "f4") for path, leaf in leaves.items()}}], metadata)


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
def test_peft_computes_the_same_logits(name: str, tmp_path: Path) -> None:
    """The adapters that are exported, in PEFT; and the merged export, in transformers."""
    peft = pytest.importorskip("peft")
    torch, hf = pytest.importorskip("torch"), pytest.importorskip("transformers")
    adapters(name, tmp_path / "peft")
    assert main(["weights", "import", str(tmp_path / "peft"), "--to", str(tmp_path / "imported")]) == 0
    changed(tmp_path / "imported", tmp_path / "changed")
    for checkpoint in ("imported", "changed"):
        export = ["weights", "export", str(tmp_path / checkpoint), "--to"]
        assert main([*export, str(tmp_path / f"{checkpoint}-out"), "--adapters"]) == 0
        assert main([*export, str(tmp_path / f"{checkpoint}-merged")]) == 0
    ids = torch.arange(1, 17)[None] * 7 % 288

    def logits(folder: Path, adapter: Path | None) -> np.ndarray:
        model = hf.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
        model = model if adapter is None else peft.PeftModel.from_pretrained(model, str(adapter))
        with torch.no_grad():
            return np.asarray(model(ids).logits)

    expected = logits(golden.FOLDER / name, tmp_path / "imported-out")
    assert np.abs(expected - logits(golden.FOLDER / name, None)).max() > 0.01
    np.testing.assert_array_equal(expected, logits(golden.FOLDER / name, tmp_path / "peft"))
    np.testing.assert_allclose(logits(tmp_path / "imported-merged", None), expected, atol=golden.TOLERANCE)
    after = logits(golden.FOLDER / name, tmp_path / "changed-out")
    assert np.abs(after - expected).max() > 0.01
    np.testing.assert_allclose(logits(tmp_path / "changed-merged", None), after, atol=golden.TOLERANCE)
