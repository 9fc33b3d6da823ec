"""Programs for TPUs: reading a small one, and the search of the largest batch."""

import jax
import jax.numpy as jnp
import pytest

from sit_jax.parallel.mesh import batch_sharding, make_mesh
from sit_jax.planning import tpu_compile
from sit_jax.planning.tpu_compile import (
    Collective,
    TPUProgram,
    count_cycles,
    find_largest_batch,
    read_collectives,
    sum_by_kind,
)

TEXT = """HloModule step, input_output_alias={ {0}: (0, {}, may-alias), \
{1}: (1, {}, must-alias) }, entry_computation_layout={(f32[8]{0})->f32[8]{0}}

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%piece (p: bf16[4,8]) -> bf16[16,8] {
  %p = bf16[4,8]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %g.2 = bf16[16,8]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=3, \
metadata={op_name="a/qkv"}
}

%turn (s: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %s = (s32[], bf16[4,8]) parameter(0)
  %w = bf16[4,8]{1,0} get-tuple-element(%s), index=1
  %g.1 = bf16[16,8]{1,0} all-gather(%w), channel_id=3, metadata={op_name="a/qkv"}
  %more = bf16[16,8]{1,0} fusion(%w), kind=kLoop, calls=%piece
  %a = bf16[2,16]{1,0} broadcast(%w), dimensions={}, backend_config={\
"estimated_cycles":"100"}
  %dot.1 = f32[2,8]{1,0} dot(%a, %g.1), lhs_contracting_dims={1}
  %c.1 = f32[2,8]{1,0} convolution(%dot.1, %dot.1), operand_precision={highest,highest}
  ROOT %next = (s32[], bf16[4,8]) tuple(%w, %w)
}

%test (s.1: (s32[], bf16[4,8])) -> pred[] {
  %s.1 = (s32[], bf16[4,8]) parameter(0)
  %limit = s32[]{:T(128)} constant(28)
  %i = s32[] get-tuple-element(%s.1), index=0
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

%rare (r: f32[8]) -> f32[8] {
  %r = f32[8]{0} parameter(0)
  ROOT %e = f32[8]{0} all-to-all(%r), channel_id=9, dimensions={0}
}

ENTRY %main (p0: f32[8], p1: f32[8]) -> f32[8] {
  %p0 = f32[8]{0} parameter(0)
  %loop = (s32[], bf16[4,8]) while(%t), condition=%test, body=%turn
  %s.2 = (f32[8]{0}, f32[8]{0}, u32[]) collective-permute-start(%p0), channel_id=4
  %s.3 = f32[8]{0} collective-permute-done(%s.2)
  %r.1 = (f32[8]{0}, /*index=1*/f32[2,2]{1,0}) all-reduce(%p0, %q), channel_id=5, \
to_apply=%add
  %if = f32[8]{0} conditional(%k, %p0, %p0), branch_computations={%rare, %rare}
  ROOT %out = f32[8]{0} copy(%p0), backend_config={"estimated_cycles":"7"}
}
"""


def test_collectives_have_bytes_and_loop_counts():
    found = {each.kind: each for each in read_collectives(TEXT)}
    # the one in %piece is the same channel, and the loop goes round 28 times
    assert found["all-gather"] == Collective("all-gather", 16 * 8 * 2, 28, "a/qkv")
    assert found["collective-permute"][1:3] == (32, 1)  # not operand and result both
    assert found["all-reduce"][1:3] == (32 + 16, 1)
    assert found["all-to-all"][1:3] == (32, 2)  # in each branch
    table = sum_by_kind(read_collectives(TEXT))
    assert table["all-gather"] == (1, 28, 28 * 256)
    assert len(table) == 4 and "reduce-scatter" not in table


def program(line):
    return f"ENTRY %main (p: f32[8]) -> f32[8] {{\n  {line}\n}}\n"


@pytest.mark.parametrize(
    "line, size",
    [
        (
            "%g = ((f32[8]{0}, f32[4]), (f32[32], f32[16]{0})) all-gather-start(%p)",
            4 * 48,  # the compiler gathers several at once
        ),
        ("%g = (f32[8], f32[32]) all-gather-start(%p)", 4 * 32),
        ("%g = f32[32] all-reduce-start(%p)", 4 * 32),
        ("%g = (f32[8], f32[8], u32[], u32[]) collective-permute-start(%p)", 32),
        ("%g = f32[] all-reduce(%p)", 4),
    ],
)
def test_collective_start_counts_its_results_only(line, size):
    (found,) = read_collectives(program(line))
    assert found.bytes == size


def test_loop_counts_noted_by_the_compiler_win():
    """Where a loop's condition is a fusion, its constant is among others."""
    note = ', backend_config={"known_trip_count":{"n":"7"}}'
    loop = "(s32[], bf16[4,8]) while(%t), condition=%test, body=%turn"
    assert count_cycles(TEXT) == 28 * 100 + 7
    assert count_cycles(TEXT.replace(loop, loop + note)) == 7 * 100 + 7


@pytest.mark.parametrize(
    "type, size",
    [("f32[2,3]", 24), ("bf16[4]", 8), ("pred[5]", 5), ("s8[7]", 7), ("f8e4m3fn[3]", 3)]
    + [("u32[]", 4), ("s64[2]", 16), ("f64[1]", 8)],
)
def test_array_bytes_of_every_type(type, size):
    assert tpu_compile.array_bytes(*type.removesuffix("]").split("[")) == size


def test_collectives_of_a_program_of_this_jax():
    """A loop of three products, whose sum over the rows needs a collective."""
    mesh = make_mesh()

    def fn(x, w):
        each = lambda total, w: (total + jnp.sum(x @ w), None)
        return jax.lax.scan(each, 0.0, w)[0]

    rows = batch_sharding(mesh)
    x = jax.ShapeDtypeStruct((16, 4), jnp.float32, sharding=rows)
    w = jax.ShapeDtypeStruct((3, 4, 4), jnp.float32)
    text = jax.jit(fn).lower(x, w).compile().as_text()
    (found,) = read_collectives(text)
    assert found.kind == "all-reduce" and found.bytes == 4
    assert found.times in (1, 3)  # the compiler may take it out of the loop


def limited(per_image, most):
    """A compiler that fits `most` bytes, and the batches that it was asked for."""
    batches = []

    def compile_batch(batch):
        batches.append(batch)
        size = per_image * batch
        return TPUProgram(most, 0, size, 0, 0, 1.0, "") if size <= most else None

    return compile_batch, batches


@pytest.mark.parametrize("first", [8, 64, 4096])
def test_largest_batch_is_found_in_a_few_attempts(first):
    compile_batch, batches = limited(per_image=10, most=5000)
    program = compile_batch(first)
    found = find_largest_batch(compile_batch, first, program, step=8, attempts=12)
    assert found == 496 and len(batches) <= 12  # 500 in multiples of 8
    assert find_largest_batch(limited(10, 5)[0], first, None, step=8) == 0
