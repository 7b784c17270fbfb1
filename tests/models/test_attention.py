"""Attention is computed by what the devices have, and the choice is said."""

import contextlib
import importlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.extend.core import ClosedJaxpr, Jaxpr, jaxprs_in_params
from staged import staged

import meshpipe.hardware
from meshpipe import PipelineConfig, make_mesh
from meshpipe.hardware.catalogue import find_hardware
from meshpipe.layers.task import Task
from meshpipe.models import LanguageModelConfig
from meshpipe.models.attention import Call, attend, choose_attention, cpu_devices_stand_in
from meshpipe.report.plan import layout_lines
from meshpipe.stage.backward import trace_backward, trace_split
from meshpipe.stage.jaxpr import nbytes


@dataclass(frozen=True)
class Gpu:
    """A device that is not here."""

    device_kind: str = "NVIDIA H100 80GB HBM3"
    platform: str = "gpu"
    compute_capability: str = "9.0"


@dataclass(frozen=True)
class Described:
    """A device as a mesh of compile-only devices has it: its kind is all that it says."""

    device_kind: str
    platform: str = "gpu"


BLACKWELL = Gpu("NVIDIA B200", compute_capability="10.0")
OLD, AMPERE = Gpu("Tesla V100-SXM2-16GB", compute_capability="7.0"), Gpu("NVIDIA A100", compute_capability="8.0")


TPU = Gpu("TPU v5 lite", "tpu", "")


@pytest.mark.parametrize(
    ("kernel", "device", "dtype", "head_dim", "reason"),
    [
        ("cudnn", Gpu(), "bfloat16", 128, None),
        ("cudnn", Gpu(), "float16", 256, None),
        ("cudnn", AMPERE, "bfloat16", 128, None),
        ("cudnn", AMPERE, "bfloat16", 256, "at most 128, and these have 256"),
        ("cudnn", BLACKWELL, "bfloat16", 128, None),
        ("cudnn", BLACKWELL, "bfloat16", 192, "at most 128, and these have 192"),
        ("cudnn", Gpu(), "float32", 64, "bfloat16 or float16, and the model in float32"),
        ("cudnn", Gpu(), "bfloat16", 20, "a multiple of 8 features"),
        ("cudnn", OLD, "bfloat16", 64, "8.0 or above, and this is a Tesla V100"),
        ("cudnn", Gpu("AMD Instinct MI300X"), "bfloat16", 64, "cuDNN needs an NVIDIA GPU"),
        ("cudnn", Gpu("cpu", "cpu"), "bfloat16", 64, "these are cpu devices"),
        ("pallas", TPU, "bfloat16", 20, None),
        ("pallas", TPU, "float32", 128, None),
        ("pallas", TPU, "float16", 128, "bfloat16 or float32, and the model in float16"),
        ("pallas", Gpu("cpu", "cpu"), "float32", 128, "Pallas needs a TPU, and these are cpu devices"),
    ],
)
def test_auto_takes_the_kernel_of_the_devices_and_a_name_is_refused_where_it_cannot_be_had(
    kernel: Any, device: Gpu, dtype: str, head_dim: int, reason: str | None
) -> None:
    sizes: Any = {"dtype": dtype, "head_dim": head_dim, "device": device}
    assert choose_attention("xla", **sizes) == "xla"
    assert choose_attention("auto", **sizes) == (kernel if reason is None else "xla")
    if reason is None:
        assert choose_attention(kernel, **sizes) == kernel
    else:
        with pytest.raises(ValueError, match=f"{re.escape(reason)}.*Choose `attention` auto or xla"):
            choose_attention(kernel, **sizes)


@pytest.mark.parametrize(
    ("device", "softcap", "call", "reason"),
    [
        (Gpu(), True, Call(queries=256, keys=256), "cuDNN does not cap scores"),
        (Gpu(), False, Call(queries=255, keys=255, segments=True), "an even number of positions"),
        (Gpu(), False, Call(queries=256, keys=256, looks_ahead=True), "where positions attend to earlier ones"),
        (TPU, False, Call(queries=256, keys=256, mask=True), "segment_ids, and no other mask"),
    ],
)
def test_what_a_call_asks_for_counts(device: Gpu, softcap: bool, call: Call, reason: str) -> None:
    asked: Any = {"dtype": "bfloat16", "head_dim": 64, "device": device, "softcap": softcap, "call": call}
    assert choose_attention("auto", **asked) == "xla"
    with pytest.raises(ValueError, match=reason):
        choose_attention("cudnn" if device.platform == "gpu" else "pallas", **asked)


def test_short_sequences_are_not_padded_for_a_kernel_that_nobody_asked_for() -> None:
    sizes: Any = {"dtype": "bfloat16", "head_dim": 64, "device": TPU, "call": Call(queries=64, keys=64)}
    assert choose_attention("auto", **sizes) == "xla"
    assert choose_attention("pallas", **sizes) == "pallas"


def test_a_described_gpu_has_the_compute_capability_of_the_catalogue() -> None:
    device = Described("NVIDIA A100-SXM4-80GB")
    assert choose_attention("auto", dtype="bfloat16", head_dim=128, device=device) == "cudnn"
    with pytest.raises(ValueError, match="at most 128, and these have 256"):
        choose_attention("cudnn", dtype="bfloat16", head_dim=256, device=device)
    for kind, expected in (("NVIDIA H200", "cudnn"), ("NVIDIA B200", "xla")):
        assert choose_attention("auto", dtype="bfloat16", head_dim=256, device=Described(kind)) == expected


@pytest.mark.parametrize("head_dim", [128, 192, 256])
@pytest.mark.parametrize(("kind", "largest"), [("NVIDIA H200", 256), ("NVIDIA A100-SXM4-80GB", 128)])
def test_jax_writes_cudnn_for_a_described_gpu_as_it_would_on_that_gpu(
    kind: str, largest: int, head_dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails when what `answer_for_described` changes has moved in JAX."""
    monkeypatch.setattr("meshpipe.models.attention.traced_device", lambda: Described(kind))
    query = jax.ShapeDtypeStruct((2, 16, 4, head_dim), "bfloat16")
    key = jax.ShapeDtypeStruct((2, 16, 2, head_dim), "bfloat16")

    def squares(query: jax.Array, key: jax.Array) -> jax.Array:
        # Under a rematerialisation, the forward of the kernel's derivative is traced after `attend` has returned.
        found = jax.checkpoint(lambda q, k: attend(q, k, k, causal=True, window=8))(query, key)
        return (found.astype("float32") ** 2).sum()

    with contextlib.ExitStack() as stack:
        if head_dim > largest:  # that JAX refuses it as well, and not `choose_attention` alone
            assert choose_attention("auto", dtype="bfloat16", head_dim=head_dim, device=Described(kind)) == "xla"
            monkeypatch.setattr("meshpipe.models.attention.choose_attention", lambda *args, **options: "cudnn")
            stack.enter_context(pytest.raises(NotImplementedError, match="head dim must be <= 128"))
        assert backwards_inside(jax.make_jaxpr(jax.grad(squares))(query, key)) == 1


@pytest.mark.parametrize(("name", "kernel"), [("h100", "cudnn"), ("v5e", "pallas")])
def test_cpu_devices_in_place_of_known_ones_are_traced_with_the_attention_of_these(name: str, kernel: str) -> None:
    """No package for these devices is needed for that."""
    query, key = (jax.ShapeDtypeStruct((2, 256, heads, 64), "bfloat16") for heads in (4, 2))
    with cpu_devices_stand_in(find_hardware(name)):
        traced = jax.make_jaxpr(jax.grad(lambda q, k: attend(q, k, k, causal=True).astype("float32").sum()))(query, key)
        with pytest.raises(ValueError, match=r"these are (gpu|tpu) devices"):
            choose_attention("cudnn" if kernel == "pallas" else "pallas", dtype="bfloat16", head_dim=64)
    assert ("attention_bwd" if kernel == "cudnn" else "pallas_call") in str(traced)


def test_a_gpu_of_a_file_has_the_compute_capability_that_the_file_says(tmp_path: Path) -> None:
    catalogue = json.loads(Path(meshpipe.hardware.__file__).with_name("catalogue.json").read_text())
    entry = next(entry for entry in catalogue if entry["name"] == "h100")
    entry |= {"device_kind": "Workshop GPU", "compiler": entry["compiler"] | {"compute_capability": "8.6"}}
    (tmp_path / "own.json").write_text(json.dumps(entry))
    assert choose_attention("auto", dtype="bfloat16", head_dim=256, device=Described("Workshop GPU")) == "cudnn"
    find_hardware(str(tmp_path / "own.json"))
    assert choose_attention("auto", dtype="bfloat16", head_dim=256, device=Described("Workshop GPU")) == "xla"


def batch(seq: int = 16) -> dict[str, np.ndarray]:
    tokens = {name: np.zeros((8, seq), np.int32) for name in ("inputs", "targets", "segment_ids")}
    return tokens | {"weights": np.ones((8, seq), np.float32)}


def model(attention: Any, schedule: str = "1f1b", data: int = 1, seq: int = 16) -> Any:
    config = LanguageModelConfig(
        d_model=32, num_blocks=2, num_heads=2, num_kv_heads=1, d_hidden=64, dtype="bfloat16", attention=attention
    )
    task = Task(config.layers(), config.loss, batch=batch(seq), notes=config.notes)
    return staged(task, make_mesh(2, data), PipelineConfig(num_microbatches=2, schedule=schedule))


def test_a_model_says_what_it_takes_and_refuses_what_its_devices_lack() -> None:
    assert model("auto").choices == (
        "Attention by XLA: fused kernels are for NVIDIA GPUs and TPUs, and these are cpu devices.",
    )
    assert model("xla").choices == ("Attention by XLA.",)
    assert not any("Attention" in line for line in layout_lines("mine", model("auto")))  # nothing to choose on CPU
    for kernel in ("cudnn", "pallas"):
        with pytest.raises(ValueError, match=r"cpu devices\. Choose `attention` auto or xla"):
            model(kernel)


def test_a_plan_on_cpu_devices_says_what_it_counts_and_refuses_only_what_no_device_has() -> None:
    with cpu_devices_stand_in():
        (asked,), (other,) = model("cudnn").choices, model("pallas").choices
        (found,) = model("auto").choices
        with pytest.raises(ValueError, match=r"and the model in float32\. Choose `attention` auto or xla"):
            choose_attention("cudnn", dtype="float32", head_dim=64)
    assert asked == "Attention: cuDNN is asked for; this plan is laid out on CPU devices and counts XLA's."
    assert other == asked.replace("cuDNN", "Pallas")
    assert found == (
        "Attention by XLA: fused kernels are for NVIDIA GPUs and TPUs, and this plan is laid out on CPU devices."
    )
    with pytest.raises(ValueError, match="these are cpu devices"):
        model("cudnn")


def backwards_inside(program: Jaxpr | ClosedJaxpr) -> int:
    """How often it computes the gradients of cuDNN's attention."""
    jaxpr = program.jaxpr if isinstance(program, ClosedJaxpr) else program
    inner = (backwards_inside(part) for equation in jaxpr.eqns for part in jaxprs_in_params(equation.params))
    return sum("attention_bwd" in equation.primitive.name for equation in jaxpr.eqns) + sum(inner)


def kernels(program: ClosedJaxpr, name: str) -> int:
    return sum(name in equation.primitive.name for equation in program.jaxpr.eqns)


@pytest.mark.parametrize("data", [1, 2])
def test_cudnn_passes_through_the_stages(monkeypatch: pytest.MonkeyPatch, data: int) -> None:
    """Traced alone: its kernel stands whole in forward and in both parts of backward, and no scores are stored."""
    cudnn = importlib.import_module("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr("meshpipe.models.attention.choose_attention", lambda asked, **_: asked)
    monkeypatch.setattr("meshpipe.models.transformer.attention_notes", lambda *_, **__: [])
    stored = {}
    for attention in ("xla", "cudnn"):
        for stage in model(attention, "zb-h1", data).trace():
            shapes = [
                tuple(jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in values)
                for values in (stage.hoisted_vars, stage.residual_vars)
            ]
            with jax.set_mesh(stage.spec.mesh):
                backward, parts = trace_backward(stage, *shapes), trace_split(stage, *shapes)
            # The first stage has no gradient of its input, so all of its backward is in the weight part.
            split = {"input": int(stage.spec.index > 0), "weight": int(stage.spec.index == 0)}
            found = {
                "forward": kernels(stage.forward(outputs=True, residuals=True), "attention_fwd"),
                "backward": kernels(backward, "attention_bwd"),
                "input": kernels(parts.input_part(), "attention_bwd"),
                "weight": kernels(parts.weight_part(), "attention_bwd"),
            }
            expected = {"forward": 1, "backward": 1, **split}
            assert found == (expected if attention == "cudnn" else dict.fromkeys(expected, 0))
            stored[attention, stage.spec.index] = nbytes(stage.residual_vars)
            if attention == "cudnn":
                assert not any(v.aval.shape[-2:] == (16, 16) and v.aval.ndim == 5 for v in stage.residual_vars)
    assert stored["cudnn", 0] < stored["xla", 0]


def kernels_inside(program: Jaxpr | ClosedJaxpr) -> int:
    """How many Pallas kernels a program has, at any depth."""
    jaxpr = program.jaxpr if isinstance(program, ClosedJaxpr) else program
    inner = (kernels_inside(part) for equation in jaxpr.eqns for part in jaxprs_in_params(equation.params))
    return sum(equation.primitive.name == "pallas_call" for equation in jaxpr.eqns) + sum(inner)


@pytest.mark.parametrize("data", [1, 2])
def test_pallas_passes_through_the_stages(monkeypatch: pytest.MonkeyPatch, data: int) -> None:
    """Traced alone: forward has one kernel, backward two, whole in one of its parts, and no scores are stored."""
    monkeypatch.setattr("meshpipe.models.attention.choose_attention", lambda asked, **_: asked)
    monkeypatch.setattr("meshpipe.models.transformer.attention_notes", lambda *_, **__: [])
    for stage in model("pallas", "zb-h1", data, seq=128).trace():
        shapes = [
            tuple(jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in values)
            for values in (stage.hoisted_vars, stage.residual_vars)
        ]
        with jax.set_mesh(stage.spec.mesh):
            backward, parts = trace_backward(stage, *shapes), trace_split(stage, *shapes)
        assert kernels_inside(stage.forward(outputs=True, residuals=True)) == 1
        # The first stage has no gradient of its input, so all of its backward is in the weight part.
        found = [kernels_inside(part) for part in (backward, parts.input_part(), parts.weight_part())]
        assert found == [2, *((2, 0) if stage.spec.index > 0 else (0, 2))]
        assert not any(v.aval.shape[-2:] == (128, 128) for v in stage.residual_vars)
