"""Reading the text of optimised programs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from meshpipe.compiled.collectives import collectives_of
from meshpipe.compiled.hlo import Module, arrays
from meshpipe.compiled.work import bytes_accessed, products_of


def compiled(function, *shapes):
    return Module(jax.jit(function).lower(*shapes).compile().as_text())


def shape(*dims, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(dims, dtype)


def test_types_are_read_with_their_layouts() -> None:
    found = arrays("(f32[], bf16[256,128]{1,0:T(8,128)(2,1)S(1)}, /*index=2*/s4[3,5]{1,0:E(4)}, token[])")
    assert [array.shape for array in found] == [(), (256, 128), (3, 5), ()]
    assert [array.bytes for array in found] == [4, 65536, 8, 0]
    assert [array.is_fast for array in found] == [False, True, False, False]


def test_products_of_a_loop_count_as_often_as_it_turns() -> None:
    def scan(x, weights):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]

    module = compiled(scan, shape(16, 8), shape(5, 8, 8))
    assert products_of(module) == {"float32": 5 * 2 * 16 * 8 * 8}


def test_products_of_batches_and_convolutions_are_counted() -> None:
    attention = compiled(lambda q, k: jnp.einsum("bqhd,bkhd->bhqk", q, k), shape(2, 16, 4, 8), shape(2, 32, 4, 8))
    assert products_of(attention) == {"float32": 2 * 2 * 4 * 16 * 32 * 8}

    def convolve(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    found = sum(products_of(compiled(convolve, shape(2, 16, 16, 4), shape(3, 3, 4, 8))).values())
    assert found == 2 * 2 * 14 * 14 * 8 * 3 * 3 * 4


def test_the_bytes_of_a_slice_are_not_those_of_the_whole() -> None:
    whole = compiled(lambda x: x * 2.0, shape(1024, 1024))
    part = compiled(lambda x, i: jax.lax.dynamic_slice(x, (i, 0), (1, 1024)) * 2.0, shape(1024, 1024), shape(dtype=int))
    assert bytes_accessed(whole) == 2 * 4 * 1024 * 1024
    assert bytes_accessed(part) < 4 * 4 * 1024


TEXT = """HloModule m

ENTRY %main (a: f32[8,4]) -> f32[8,4] {
  %a = f32[8,4]{1,0} parameter(0)
  ROOT %all-reduce = f32[8,4]{1,0} all-reduce(%a), channel_id=1, GROUPS, to_apply=%add
}
"""


@pytest.mark.parametrize(
    ("groups", "axes"),
    [
        ("replica_groups={{0,1},{2,3},{4,5},{6,7}}", ("tensor",)),
        ("replica_groups={{0,2},{1,3},{4,6},{5,7}}", ("data",)),
        ("replica_groups=[4,2]<=[8]", ("tensor",)),
        ("replica_groups=[2,4]<=[2,2,2]T(2,0,1)", ("expert", "data")),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=2,'axis_2'=2] {'axis_1'}", ("data",)),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0','axis_1'}", ("expert", "data", "tensor")),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=2], device_ids=([2,4]T(1,0)) {'axis_1'}", ("expert",)),
        ("replica_groups={}", ("expert", "data", "tensor")),
        ("replica_groups={{0,1,2,3,4,5,6,7}}", ("expert", "data", "tensor")),
    ],
)
def test_the_axes_of_a_collective_are_those_along_which_its_groups_extend(groups: str, axes: tuple[str, ...]) -> None:
    module = Module(TEXT.replace("GROUPS", groups))
    (found,) = collectives_of(module, {"expert": 2, "data": 2, "tensor": 2})
    assert (found.kind, found.count, found.bytes, found.axes) == ("all-reduce", 1, 128, axes)


def test_collectives_of_a_partitioned_program_are_found_with_their_axes() -> None:
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)

    def on(*spec):
        return NamedSharding(mesh, PartitionSpec(*spec))

    def product(x, w):
        return x @ w

    x, w = shape(8, 16), shape(16, 32)
    x, w = x.update(sharding=on("data", "tensor")), w.update(sharding=on("tensor", None))
    text = jax.jit(product, out_shardings=on("data", None)).lower(x, w).compile().as_text()
    (found,) = collectives_of(Module(text), dict(mesh.shape))
    assert (found.kind, found.axes, found.bytes) == ("all-reduce", ("tensor",), 4 * 32 * 4)


KERNEL = """HloModule m

ENTRY %main (q: bf16[2,4,128,32], k: bf16[2,2,256,32]) -> bf16[2,4,128,32] {
  %t = s8[1,1,1]{2,1,0} constant({ { {1} } })
  %q = bf16[2,4,128,32]{3,2,1,0:T(8,128)(2,1)} parameter(0)
  %k = bf16[2,2,256,32]{3,2,1,0:T(8,128)(2,1)} parameter(1)
  %splash_mha_fwd.1 = (f32[8], bf16[2,4,128,32]) custom-call(%t, %q, %k, %k), frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 128}"
}}, metadata={op_name="pallas_call"}
  %got = bf16[2,4,128,32]{3,2,1,0} get-tuple-element(%splash_mha_fwd.1), index=1, frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 128}"
}}
  ROOT %all-reduce = bf16[2,4,128,32]{3,2,1,0} all-reduce(%got), channel_id=1, replica_groups={{0,1}}, to_apply=%add
}

%add (a: bf16[], b: bf16[]) -> bf16[] {
  %a = bf16[] parameter(0)
  %b = bf16[] parameter(1)
  ROOT %sum = bf16[] add(%a, %b)
}, execution_thread="main"
"""


def test_a_pallas_kernel_has_attributes_of_several_lines_and_what_follows_it_is_read() -> None:
    module = Module(KERNEL)
    assert [*module.computations] == ["main", "add"]
    (found,) = collectives_of(module, {"tensor": 2})
    assert (found.kind, found.bytes, found.axes) == ("all-reduce", 2 * 2 * 4 * 128 * 32, ("tensor",))
    assert products_of(module) == {"bfloat16": 2 * 2 * 2 * 4 * 128 * 256 * 32}
