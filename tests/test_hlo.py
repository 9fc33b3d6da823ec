"""Reading programs: a small one written by hand, and one that is compiled here."""

import jax
import jax.numpy as jnp
import pytest

from sit_jax.parallel.mesh import batch_sharding, make_mesh
from sit_jax.planning import hlo
from sit_jax.planning.hlo import Collective, Product

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


def test_collectives_with_their_bytes_and_turns():
    found = {each.kind: each for each in hlo.collectives(TEXT)}
    # the one in %piece is the same channel, and the loop goes round 28 times
    assert found["all-gather"] == Collective("all-gather", 16 * 8 * 2, 28, "a/qkv")
    assert found["collective-permute"][1:3] == (32, 1)  # not operand and result both
    assert found["all-reduce"][1:3] == (32 + 16, 1)
    assert found["all-to-all"][1:3] == (32, 2)  # in each branch
    assert len(hlo.collectives(TEXT)) == 4


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
def test_what_begins_counts_by_its_results(line, size):
    (found,) = hlo.collectives(program(line))
    assert found.bytes == size


@pytest.mark.parametrize(
    "groups, devices",
    [("{{0,1,2,3},{4,5,6,7}}", 4), ("[2,8]<=[16]", 8), ("[16]<=[16]", 16), ("{}", 0)]
    + [("mesh['a'=2,'b'=16] {'b'}", 16), ("mesh['a'=2,'b'=16] {'a','b'}", 32)],
)
def test_what_is_scattered_is_sent_to_each_of_its_group(groups, devices):
    line = f"%s = f32[8] reduce-scatter(%p), replica_groups={groups}, to_apply=%add"
    (found,) = hlo.collectives(program(line))
    assert found.devices == devices
    assert hlo.sent([found]) == 32 * max(devices - 1, 1)


def test_the_turns_that_the_compiler_notes_count():
    """Where a loop's condition is a fusion, its constant is among others."""
    note = ', backend_config={"known_trip_count":{"n":"7"}}'
    loop = "(s32[], bf16[4,8]) while(%t), condition=%test, body=%turn"
    assert hlo.cycles(TEXT.replace(loop, loop + note)) == 7 * 100 + 7


def reckoned(count, name, op="add(%p)"):
    told = f'backend_config={{"estimated_cycles":"{count}"}}'
    return f'%x = f32[8]{{0}} {op}, metadata={{op_name="{name}"}}, {told}'


@pytest.mark.parametrize(
    "name, layer",
    [
        ("jvp(SiT)/SiT/while/body/closed_call/blocks/fc2/fc2.times/dot", "blocks/fc2"),
        (
            "SiT/while/body/checkpoint/blocks/fc2/cond/branch_0_fun/dot",
            "SiT/blocks/fc2",
        ),
        ("checkpoint/blocks/fc2/add;checkpoint/rematted_computation/mul", "blocks/fc2"),
        ("transpose(jvp(SiT))/SiT/blocks/bti,inhd->nhbdt/vmap()/add", "blocks"),
        ("jvp(SiT)/SiT/cond/label/jit(_take)/add", "cond/label"),
        ("jvp(SiT)/SiT/while/body/dynamic_update_slice", "SiT"),
        ("jvp(MDT)/MDT.encode/while/body/dynamic_update_slice", "MDT"),
        ("jit(_where)/select_n", ""),
    ],
)
def test_cycles_count_for_the_layer_of_their_operation(name, layer):
    text = program(reckoned(9, f"jit(step)/{name}"))
    assert hlo.by_layer(text) == {layer: (9, 0)}


def test_cycles_in_products_are_those_of_fusions_with_a_product():
    fused = "%f (a: f32[8]) -> f32[8] {\n  %d = f32[8]{0} convolution(%a, %a)\n}\n"
    lines = (reckoned(5, "j/a/add"), reckoned(7, "j/b/dot", "dot(%p, %p)"))
    inside = reckoned(3, "j/a/add", "fusion(%p), calls=%f")
    text = fused + program("\n  ".join((*lines, inside)))
    assert list(hlo.by_layer(text).items()) == [("a", (8, 3)), ("b", (7, 7))]
    assert hlo.cycles(text) == 15


def test_they_are_summed_by_kind():
    table = hlo.by_kind(hlo.collectives(TEXT))
    assert table["all-gather"] == (1, 28, 28 * 256)
    assert "reduce-scatter" not in table


def test_a_sum_sends_twice_what_a_gather_does():
    gathered, moved = 28 * 256, 32 + 2 * 32  # a permute, and two all-to-alls
    assert hlo.sent(hlo.collectives(TEXT)) == gathered + moved + 2 * (32 + 16)


def test_products_with_the_types_of_their_operands():
    assert dict(hlo.products(TEXT)) == {
        Product("bf16", "bf16", "f32", "default"): 1,
        Product("f32", "f32", "f32", "highest"): 1,
    }


def test_cycles_are_counted_as_often_as_their_loop_turns():
    assert hlo.cycles(TEXT) == 28 * 100 + 7


def test_outputs_in_the_memory_of_inputs_are_counted():
    assert hlo.aliased(TEXT) == 2
    assert hlo.aliased("HloModule f\n" + TEXT.partition("\n")[2]) == 0


@pytest.mark.parametrize(
    "type, size",
    [("f32[2,3]", 24), ("bf16[4]", 8), ("pred[5]", 5), ("s8[7]", 7), ("f8e4m3fn[3]", 3)]
    + [("u32[]", 4), ("s64[2]", 16), ("f64[1]", 8)],
)
def test_sizes_of_types(type, size):
    assert [hlo._size(*array) for array in hlo._ARRAY.findall(type)] == [size]


def test_a_program_of_this_jax_is_read():
    """A loop of three products, whose sum over the rows needs a collective."""
    mesh = make_mesh()

    def fn(x, w):
        each = lambda total, w: (total + jnp.sum(x @ w), None)
        return jax.lax.scan(each, 0.0, w)[0]

    rows = batch_sharding(mesh)
    x = jax.ShapeDtypeStruct((16, 4), jnp.float32, sharding=rows)
    w = jax.ShapeDtypeStruct((3, 4, 4), jnp.float32)
    text = jax.jit(fn).lower(x, w).compile().as_text()
    (found,) = hlo.collectives(text)
    assert found.kind == "all-reduce" and found.bytes == 4
    assert found.times in (1, 3)  # the compiler may take it out of the loop
    assert [each[:3] for each in hlo.products(text)] == [("f32", "f32", "f32")]
