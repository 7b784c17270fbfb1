"""The operations of a compiled program, and the bytes of memory that it reads and writes."""

import itertools
import json
import math
import re
from collections import defaultdict

from meshpipe.compiled.collectives import KINDS
from meshpipe.compiled.hlo import Array, Computation, Instruction, Module

_DTYPES = {
    "bf16": "bfloat16",
    "f16": "float16",
    "f32": "float32",
    "f64": "float64",
    "c64": "complex64",
    "c128": "complex128",
    "s8": "int8",
    "u8": "int8",
    "s32": "int32",
    "f8e4m3fn": "float8_e4m3fn",
    "f8e5m2": "float8_e5m2",
}
_NO_MEMORY = (
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all"),
    *("partition-id", "replica-id", "iota", "copy-done", "opt-barrier", "add-dependency", "async-done"),
    *(f"{kind}-done" for kind in KINDS),
)
_SLICES = ("dynamic-slice", "slice", "gather")
_SPLASH = {"splash_mha_fwd": 2, "splash_mha_dq": 3, "splash_mha_dkv": 4}
"""The products of every query with every key in each of JAX's attention kernels for TPUs, which make no estimate."""
_ESTIMATE = re.compile(r'"cost_estimate":\s*(\{[^{}]*\})')


def products_of(module: Module) -> dict[str, float]:
    """Floating-point operations of matrix products and convolutions by dtype of their operands, on one device."""
    found: dict[str, float] = defaultdict(float)
    for computation, instruction, times, _ in module.walk(inside_fusions=True):
        operations = _operations(computation, instruction)
        if operations:
            operands = computation.operands(instruction)
            # A kernel may take tables of integers before what it multiplies.
            dtype = (*(array.dtype for array in _floating(operands)), *(array.dtype for array in operands), "f32")[0]
            found[_DTYPES.get(dtype, dtype)] += times * operations
    return dict(found)


def _operations(computation: Computation, instruction: Instruction) -> float:
    if instruction.op == "dot":
        contracted = _numbers(instruction.attributes, "lhs_contracting_dims")
        (left, *_), result = computation.operands(instruction), instruction.results[0]
        return 2.0 * result.size * math.prod(left.shape[dim] for dim in contracted)
    if instruction.op == "convolution":
        return _of_convolution(computation, instruction)
    if instruction.op == "custom-call":
        return _of_custom_call(computation, instruction)
    return 0.0


def _of_convolution(computation: Computation, instruction: Instruction) -> float:
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    operands, result = computation.operands(instruction), instruction.results[0]
    if labels is None or len(operands) < 2:
        return 0.0
    base, kernel = operands[0], operands[1]
    operations = 2.0 * result.shape[labels[3].index("b")] * result.shape[labels[3].index("f")]
    operations *= kernel.shape[labels[2].index("i")]
    for k in range(sum(label.isdigit() for label in labels[1])):
        name = str(k)
        sizes = (base.shape[labels[1].index(name)], kernel.shape[labels[2].index(name)])
        operations *= _positions(instruction.attributes, k, *sizes, result.shape[labels[3].index(name)])
    groups = _number(instruction.attributes, "batch_group_count")
    return operations / groups


def _positions(attributes: str, dim: int, base: int, kernel: int, out: int) -> int:
    """How many pairs of an output and a kernel position meet an element of the input, along one spatial dim."""
    window = re.search(r"window=\{([^}]*)\}", attributes)
    values = dict(part.split("=") for part in window[1].split()) if window else {}

    def of(name: str, default: str) -> str:
        return values[name].split("x")[dim] if name in values else default

    stride, low = int(of("stride", "1")), int(of("pad", "0_0").split("_")[0])
    base_dilation, kernel_dilation = int(of("lhs_dilate", "1")), int(of("rhs_dilate", "1"))
    if (stride, base_dilation, low, kernel_dilation) == (1, 1, 0, 1) and out == base - kernel + 1:
        return out * kernel
    last, met = (base - 1) * base_dilation, 0
    for k in range(kernel):
        # Of the places `o * stride + k * dilation - low`, those from 0 to `last` that are multiples of `base_dilation`.
        start = k * kernel_dilation - low
        first = max(0, (stride - 1 - start) // stride)
        until = min(out - 1, (last - start) // stride) if last >= start else -1
        if until >= first:
            met += sum(1 for o in range(first, until + 1) if (o * stride + start) % base_dilation == 0)
    return met


def _of_custom_call(computation: Computation, instruction: Instruction) -> float:
    target = re.search(r'custom_call_target="([^"]*)"', instruction.attributes)
    name, operands = target[1] if target else "", computation.operands(instruction)
    if "cublas" in name or "matmul" in name:
        contracted = re.search(r'"lhs_contracting_dimensions":\s*\[([^\]]*)\]', instruction.attributes)
        dims = [int(n) for n in re.findall(r"\d+", contracted[1])] if contracted else []
        return 2.0 * instruction.results[0].size * math.prod(operands[0].shape[dim] for dim in dims) if dims else 0.0
    if "fmha" in name:
        # Two products of forward, or five of backward, of every query with every key.
        scores = _scores(operands)
        return 2.0 * scores * (5 if "Backward" in name else 2)
    if "conv" in name:
        labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
        kernel = operands[1] if len(operands) > 1 else None
        if labels and kernel:
            return 2.0 * instruction.results[0].size * kernel.size / kernel.shape[labels[2].index("o")]
    for splash, products in _SPLASH.items():
        # [..., heads, positions, head size] each. Blocks that a mask leaves out count, as they do for cuDNN.
        if instruction.name.startswith(splash) and len(found := _floating(operands)) > 1:
            return 2.0 * products * found[0].size * found[1].shape[-2]
    if (estimate := _ESTIMATE.search(instruction.attributes)) is not None:
        return float(json.loads(estimate[1]).get("flops", 0))
    return 0.0


def _floating(operands: list[Array]) -> list[Array]:
    return [array for array in operands if array.dtype.startswith(("f", "bf"))]


def _scores(operands: list[Array]) -> float:
    """Of cuDNN's attention: batch x heads x queries x keys x head size. Operands are [batch, seq, heads, size] each."""
    if len(operands) < 2 or len(operands[0].shape) != 4:
        return 0.0
    query, key = operands[0], operands[1]
    shared = {size for size in query.shape if size in key.shape}
    keys = max((size for size in key.shape if size not in shared), default=max(key.shape))
    return float(query.size * keys)


def bytes_accessed(module: Module) -> float:
    """Bytes of a device's memory that the program reads and writes; what lies on the chip itself does not count.

    A fusion reads each operand once, of an operand that it takes slices of only these, and an update in place writes
    only what it updates.
    """
    total = 0.0
    for computation, instruction, times, fused in module.walk(inside_fusions=False):
        if not fused and instruction.op not in _NO_MEMORY:
            total += times * _accessed(module, computation, instruction)
    return total


def _accessed(module: Module, computation: Computation, instruction: Instruction) -> float:
    results = [array for array in instruction.results if not array.is_fast]
    operands = [array for array in computation.operands(instruction) if not array.is_fast]
    if instruction.op in _SLICES:
        return 2.0 * sum(array.bytes for array in results)
    if instruction.op == "dynamic-update-slice":
        return 2.0 * sum(array.bytes for array in operands[1:2])
    if instruction.op == "fusion" and instruction.called:
        return _of_fusion(module.computations.get(instruction.called[0]), computation, instruction)
    return float(sum(array.bytes for array in itertools.chain(results, operands)))


def _of_fusion(fused: Computation | None, computation: Computation, instruction: Instruction) -> float:
    if fused is None:
        return 0.0
    read = 0.0
    parameters = {i.number: i for i in fused.instructions.values() if i.op == "parameter"}
    updated: set[str] = set()
    written = 0.0
    roots = [fused.root]
    if fused.root.op == "tuple":
        roots = [fused.instructions[name] for name in fused.root.operands if name in fused.instructions]
    for root in roots:
        source = _through(fused, root)
        if source.op == "dynamic-update-slice":
            updated.add(_through(fused, fused.instructions[source.operands[0]]).name)
            update = fused.instructions.get(source.operands[1])
            written += sum(array.bytes for array in update.results) if update else 0
        else:
            written += sum(array.bytes for array in root.results if not array.is_fast)
    if all(array.is_fast for array in instruction.results):
        written = 0.0
    for number, name in enumerate(instruction.operands):
        given, parameter = computation.instructions.get(name), parameters.get(number)
        if given is None or parameter is None or parameter.name in updated or all(a.is_fast for a in given.results):
            continue
        users = [i for i in fused.instructions.values() if parameter.name in i.operands]
        if users and all(user.op in _SLICES and user.operands[0] == parameter.name for user in users):
            read += sum(array.bytes for user in users for array in user.results)
        else:
            read += sum(array.bytes for array in given.results if not array.is_fast)
    return read + written


def _through(fused: Computation, instruction: Instruction) -> Instruction:
    """What an instruction shows under another type or shape."""
    while instruction.op in ("bitcast", "convert", "copy") and instruction.operands:
        below = fused.instructions.get(instruction.operands[0])
        if below is None:
            break
        instruction = below
    return instruction


def _numbers(attributes: str, name: str) -> list[int]:
    found = re.search(rf"{name}=\{{([\d,]*)\}}", attributes)
    return [int(n) for n in found[1].split(",") if n] if found else []


def _number(attributes: str, name: str) -> int:
    found = re.search(rf"{name}=(\d+)", attributes)
    return int(found[1]) if found else 1
