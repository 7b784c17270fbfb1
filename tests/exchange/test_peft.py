"""Adapters go in and out as PEFT has them."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import golden
import jax.numpy as jnp
import numpy as np
import pytest

from meshpipe import Checkpointer, load
from meshpipe.adapters.config import LoraConfig
from meshpipe.adapters.lora import with_lora
from meshpipe.checkpoint.chunks import whole
from meshpipe.cli import main
from meshpipe.exchange.exporting import export_weights
from meshpipe.exchange.exporting_adapters import export_adapters
from meshpipe.exchange.importing import import_weights
from meshpipe.exchange.peft_factors import peft_factors
from meshpipe.generation.saved import open_saved
from meshpipe.layers.examine import abstract_layers
from meshpipe.layers.shared import FACTORS
from meshpipe.runs.record import config_values
from meshpipe.weights import WeightsFolder
from meshpipe.weights.tensor_file import read_header, read_part
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


def adapters(
    name: str, folder: Path, ranks: Mapping[str, int] = MappingProxyType({}), **changes: object
) -> dict[str, np.ndarray]:
    """Writes a folder as PEFT does, with random factors."""
    rng, made = np.random.default_rng(0), {}
    for module, (inputs, outputs) in SHAPES[name].items():
        for block in range(2):
            start, rank = f"base_model.model.{module.format(block)}", ranks.get(module.format(block), RANK)
            made[f"{start}.lora_A.weight"] = rng.normal(0, 0.3, (rank, inputs)).astype(np.float32)
            made[f"{start}.lora_B.weight"] = rng.normal(0, 0.3, (outputs, rank)).astype(np.float32)
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
        ({"rank_pattern": {"q_proj": 4}}, "must have the shape"),
        ({"rank_pattern": {"q_proj": 0}}, "`q_proj` .* at least 1. Got 0 in .*/adapter_config.json"),
        ({"alpha_pattern": {"q_proj": "8"}}, "`q_proj` .* number"),
        ({"rank_pattern": {"q_proj(": 4}}, r"A key of rank_pattern .* 'q_proj\(', which is none"),
        ({"rank_pattern": {"(q|_|proj)+x": 4}}, "which may take for ever"),
        ({"init_lora_weights": "pissa_niter_4"}, "`init_lora_weights` 'pissa_niter_4'"),
        ({"trainable_token_indices": [1]}, "`trainable_token_indices`"),
        ({"modules_to_save": ["lm_head"]}, "`modules_to_save`"),
        ({"use_dora": True}, "`use_dora`"),
        ({"bias": "all"}, "`bias`"),
        ({"peft_type": "IA3"}, "`peft_type`"),
        ({"base_model_name_or_path": "nowhere/model"}, "Pass that folder as `base`"),
        ({"r": 3}, "must have the shape"),
        ({"r": 300}, "must have the shape"),
    ],
)
def test_adapters_that_are_not_computed(changes: dict[str, object], message: str, tmp_path: Path) -> None:
    adapters("llama3", tmp_path / "peft", **changes)
    with pytest.raises(ValueError, match=message):
        import_weights(tmp_path / "peft", tmp_path / "imported")
    assert not (tmp_path / "imported").exists()


def test_a_rank_above_the_size_of_its_module_is_that_of_the_file(tmp_path: Path) -> None:
    module = "model.layers.1.self_attn.o_proj"
    adapters("llama3", tmp_path / "peft", {module: 17}, rank_pattern={"layers.1.self_attn.o_proj": 17})
    said = rf"Got rank 17 in .*/adapter_model.safetensors, where .*{module}.lora_A.weight is \[17, 32\]"
    with pytest.raises(ValueError, match=said):
        WeightsFolder(tmp_path / "peft")


def test_tensors_without_a_place(tmp_path: Path) -> None:
    made = adapters("llama3", tmp_path / "peft")
    write_tensors(
        tmp_path / "peft", {**made, "base_model.model.model.embed_tokens.lora_embedding_A": np.ones((2, 288))}
    )
    with pytest.raises(ValueError, match="lora_embedding_A"):
        import_weights(tmp_path / "peft", tmp_path / "imported")
    write_tensors(
        tmp_path / "peft",
        {name.replace(".model.model.", ".model.model.language_model."): v for name, v in made.items()},
    )
    assert WeightsFolder(tmp_path / "peft").adapters is not None  # of a model that sees
    first = next(iter(made))
    write_tensors(tmp_path / "peft", {key: value for key, value in made.items() if key != first})
    with pytest.raises(ValueError, match=f"without {first}"):
        import_weights(tmp_path / "peft", tmp_path / "imported")
    (tmp_path / "peft/adapter_model.safetensors").rename(tmp_path / "peft/adapter_model.bin")
    with pytest.raises(ValueError, match=r"has adapter_model.bin alone. Load them with PEFT"):
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


def test_ranks_and_scales_of_single_modules(tmp_path: Path) -> None:
    """Patterns as PEFT writes and reads them: ends of names, whole names, and regular expressions of them."""
    q, o = "model.layers.{}.self_attn.q_proj", "model.layers.{}.self_attn.o_proj"
    sizes = {q.format(0): (4, 3), q.format(1): (3, 12), o.format(0): (2, 3), o.format(1): (2, 6)}
    patterns = {
        "rank_pattern": {r"layers\.(1|2)\..*q_proj": 3, "q_proj": 4},
        "alpha_pattern": {r"^model.layers.1.self_attn.o_proj": 6, "1.self_attn.q_proj": 12},
    }
    made = adapters("llama3", tmp_path / "peft", ranks={name: rank for name, (rank, _) in sizes.items()}, **patterns)
    import_weights(tmp_path / "peft", tmp_path / "imported")
    lora = open_saved(tmp_path / "imported").lora
    assert (lora.rank, lora.alpha, lora.targets) == (2, 3.0, ("attention/out", "attention/query"))
    assert [str(group) for group in lora.groups] == [
        "layers/2/attention/out:alpha=6",
        "layers/2/attention/query:rank=3,alpha=12",
        "layers/1/attention/query:rank=4",
    ]
    export_weights(tmp_path / "imported", tmp_path / "merged", dtype="float32")
    base, merged = (WeightsFolder(folder).tensors for folder in (golden.FOLDER / "llama3", tmp_path / "merged"))
    for name, (rank, alpha) in sizes.items():
        a, b = (made[f"base_model.model.{name}.lora_{factor}.weight"] for factor in "AB")
        before, after = (
            read_part(t, t.shape, whole(t.shape)) for t in (base[f"{name}.weight"], merged[f"{name}.weight"])
        )
        np.testing.assert_allclose(after, before + b @ a * (alpha / rank), atol=1e-6, err_msg=name)
    export_adapters(tmp_path / "imported", tmp_path / "out")
    assert tensors(tmp_path / "out") == {key: value.tobytes() for key, value in made.items()}
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["rank_pattern"] == {name: rank for name, (rank, _) in sizes.items() if rank != 2}
    assert config["alpha_pattern"] == {name: alpha for name, (_, alpha) in sizes.items() if alpha != 3}


@pytest.mark.parametrize(
    ("targets", "groups"),
    [(None, ()), (("query", "value"), ()), (("value",), ()), (("query", "value"), ("value:rank=3,alpha=4.5",))],
)
def test_what_was_trained_comes_back(targets: tuple[str, ...] | None, groups: tuple[str, ...], tmp_path: Path) -> None:
    """Adapters of the parts of one module, whose A differ, are blocks in PEFT, and themselves again here."""
    config, rng = golden.CONFIGS["gpt2"], np.random.default_rng(0)
    lora = LoraConfig(rank=RANK, alpha=3.0, targets=targets, rank_stabilised=targets is None, groups=groups)
    found = abstract_layers(with_lora(config.layers(), lora), None)
    shapes = {path: leaf.shape for layer in found for path, leaf in layer.params.items() if path.endswith(FACTORS)}
    leaves = {path: rng.normal(size=shape).astype("f4") for path, shape in shapes.items()}
    model = {"type": "GPT2Config", **config_values(config)}
    with Checkpointer(tmp_path / "trained") as checkpointer:
        metadata = {"step": 1, "config": {"model": model, "lora": config_values(lora)}}
        checkpointer.save(1, [{"params": {path: jnp.asarray(leaf) for path, leaf in leaves.items()}}], metadata)
    export_adapters(tmp_path / "trained", tmp_path / "peft", base=golden.FOLDER / "gpt2")
    import_weights(tmp_path / "peft", tmp_path / "again")
    again = open_saved(tmp_path / "again").lora
    assert (again.rank, again.alpha) == (RANK, 3.0)
    assert [str(group) for group in again.groups] == [f"attention/{group}" for group in groups]
    after = {path: leaf for path, leaf in load(tmp_path / "again").items() if path.endswith(FACTORS)}
    assert after.keys() == leaves.keys()
    for path, leaf in leaves.items():
        np.testing.assert_array_equal(after[path], leaf, err_msg=path)


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
    """The adapters that are exported, in PEFT, also of those imported again; and the merged export, in transformers."""
    peft = pytest.importorskip("peft")
    torch, hf = pytest.importorskip("torch"), pytest.importorskip("transformers")
    start = "model.layers.1.self_attn.q_proj" if name == "llama3" else "transformer.h.1.attn.c_attn"
    patterns = {"rank_pattern": {start.split(".", 1)[1]: 5}, "alpha_pattern": {r".*\.1\.\w+\.(q_proj|c_attn)": 7}}
    adapters(name, tmp_path / "peft", ranks={start: 5}, **patterns)
    imports = ["weights", "import", "--base", str(golden.FOLDER / name)]
    assert main([*imports, str(tmp_path / "peft"), "--to", str(tmp_path / "imported")]) == 0
    changed(tmp_path / "imported", tmp_path / "changed")
    assert main(["weights", "export", str(tmp_path / "changed"), "--to", str(tmp_path / "out"), "--adapters"]) == 0
    assert main([*imports, str(tmp_path / "out"), "--to", str(tmp_path / "again")]) == 0
    for checkpoint in ("imported", "changed", "again"):
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
    np.testing.assert_array_equal(after, logits(golden.FOLDER / name, tmp_path / "again-out"))
    for checkpoint in ("changed", "again"):
        np.testing.assert_allclose(logits(tmp_path / f"{checkpoint}-merged", None), after, atol=golden.TOLERANCE)
