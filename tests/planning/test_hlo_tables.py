"""benchmarks/tpu/hlo_tables.py: cycles by layer, and products by type."""

import pytest
from hlo_tables import Product, count_cycles_by_layer, read_products
from test_tpu_compile import TEXT, program


def costs(count, name, op="add(%p)"):
    cost = f'backend_config={{"estimated_cycles":"{count}"}}'
    return f'%x = f32[8]{{0}} {op}, metadata={{op_name="{name}"}}, {cost}'


@pytest.mark.parametrize(
    "name, layer",
    [
        (
            "jvp(SiT)/SiT/while/body/closed_call/blocks/fc2/fc2.product/dot",
            "blocks/fc2",
        ),
        ("checkpoint/blocks/fc2/add;checkpoint/rematted_computation/mul", "blocks/fc2"),
        ("jvp(MDT)/MDT.encode/while/body/dynamic_update_slice", "MDT"),
        ("jit(_where)/select_n", ""),
    ],
)
def test_cycles_count_for_the_layer_of_their_operation(name, layer):
    text = program(costs(9, f"jit(step)/{name}"))
    assert count_cycles_by_layer(text) == {layer: (9, 0)}


def test_cycles_in_products_include_fusions_with_a_product():
    fused = "%f (a: f32[8]) -> f32[8] {\n  %d = f32[8]{0} convolution(%a, %a)\n}\n"
    lines = (costs(5, "j/a/add"), costs(7, "j/b/dot", "dot(%p, %p)"))
    inside = costs(3, "j/a/add", "fusion(%p), calls=%f")
    text = fused + program("\n  ".join((*lines, inside)))
    assert list(count_cycles_by_layer(text).items()) == [("a", (8, 3)), ("b", (7, 7))]


def test_products_have_the_types_of_their_operands():
    assert dict(read_products(TEXT)) == {
        Product("bf16", "bf16", "f32", "default"): 1,
        Product("f32", "f32", "f32", "highest"): 1,
    }
