"""Tables of a TPU's program: cycles by layer, products by type, traffic of its wires.

python benchmarks/tpu/hlo_tables.py CONFIG TOPOLOGY [--config.FIELD=VALUE ...] compiles
a training step as train.py --plan does, and prints them.
"""

import collections
import math
import re
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[2]))

from sit_jax.planning import tpu_compile
from sit_jax.planning.tpu_compile import iterate_instructions

_PRODUCTS = {"dot", "convolution"}
_CONTROL = {"while", "body", "closed_call", "checkpoint", "rematted_computation"}
_GROUP = re.compile(r"replica_groups=(?:\{\{([\d,]+)\}|\[(?:\d+,)?(\d+)\]<=)")
_OF_MESH = re.compile(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}")


class Product(NamedTuple):
    """A product of matrices: types of operands and result, and the precision asked."""

    left: str
    right: str
    out: str
    precision: str  # default, high, highest


def read_products(text):
    """Returns a Counter of the products that are written down in a program."""
    products = collections.Counter()
    for lines in tpu_compile.parse_computations(text).values():
        types = {line.name: _first_type(line.type) for line in lines}
        for line in lines:
            if line.op in _PRODUCTS:
                operands = re.findall(r"%([\w.\-]+)", line.rest.partition(")")[0])
                left, right = (types.get(name, "?") for name in operands[:2])
                asked = re.search(r"operand_precision=\{(\w+)", line.rest)
                precision = asked[1] if asked else "default"
                products[Product(left, right, types[line.name], precision)] += 1
    return products


def count_cycles_by_layer(text):
    """Returns {layer: (cycles, of these in products)}, the most first.

    A fusion counts for the layer that it is named after. What is in no layer, such as
    what loops keep, is the network's; what is in no network, such as the optimizer, has
    no name.
    """
    program = tpu_compile.parse_computations(text)
    table = collections.defaultdict(lambda: [0, 0])
    for _, times, line in iterate_instructions(text):
        estimate = re.search(r'"estimated_cycles":"(\d+)"', line.rest)
        if not estimate:
            continue
        name = re.search(r'op_name="(.*?)"', line.rest)
        called = re.search(r"calls=%?([\w.\-]+)", line.rest)
        inner = {i.op for i in program.get(called[1], ())} if called else set()
        row = table[layer_of(name[1]) if name else ""]
        cycles = times * int(estimate[1])
        row[0] += cycles
        row[1] += cycles * bool(_PRODUCTS & {line.op, *inner})
    rows = sorted(table.items(), key=lambda row: -row[1][0])
    return {layer: tuple(row) for layer, row in rows}


def layer_of(name):
    """Returns the layer that an operation is for, the network's name, or nothing.

    jit(step)/jvp(SiT)/SiT/while/body/blocks/mlp/fc1/dot_general is for blocks/mlp/fc1.
    """
    name = name.partition(";")[0]
    words = re.sub(r"\bcond/branch_\w+/", "", name).split("/")[1:-1]
    words = [w for w in words if w.isidentifier() and w not in _CONTROL]
    network = re.search(r"jvp\((\w+)\)", name)
    if network and words[:1] in ([], [network[1]]):
        words = words[1:] or [network[1]]
    return "/".join(words)


def count_sent_bytes(text):
    """Returns the bytes that a device sends for collectives in a run, in rings.

    Of n devices each sends (n - 1) / n of a gathered array, which is nearly all of it,
    and for a sum that all get twice that. Of what is scattered only the small result
    is known, of which each sends one for every other device.
    """
    sizes = {}
    for _, _, line in iterate_instructions(text):
        if line.op.removesuffix("-start") == "reduce-scatter":
            sizes[re.search(r'op_name="(.*?)"|$', line.rest)[1] or ""] = group_size(
                line
            )
    weight = {"all-reduce": lambda c: 2}
    weight["reduce-scatter"] = lambda c: max(sizes[c.name] - 1, 1)
    return sum(
        weight.get(c.kind, lambda c: 1)(c) * c.bytes * c.times
        for c in tpu_compile.read_collectives(text)
    )


def group_size(line):
    """Returns how many devices a collective is among; 0 where nothing tells it."""
    if found := _OF_MESH.search(line.rest):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", found[2]))
    found = _GROUP.search(line.rest)
    if not found:
        return 0
    return int(found[2]) if found[2] else len(found[1].split(","))


def count_aliased(text):
    """Returns how many outputs take the memory of an input that was given away."""
    first = text.partition("\n")[0]
    begin = first.find("input_output_alias={")
    return len(re.findall(r"(?:may|must)-alias", first[begin:])) if begin >= 0 else 0


def describe_tables(text, wires=None):
    """Yields lines of all tables; wires: bytes a second that a chip sends."""
    yield "products, and how many are written down:"
    for product, count in read_products(text).most_common():
        types = f"{product.left} x {product.right} -> {product.out}"
        yield f"  {types:24} {product.precision:8} {count:4}"
    if wires:
        seconds = count_sent_bytes(text) / wires
        yield f"all collectives take {1e3 * seconds:.1f} ms if every wire is used"
    total = tpu_compile.count_cycles(text)
    yield "where cycles go, in per cent, and of these in products:"
    for layer, parts in count_cycles_by_layer(text).items():
        if parts[0] >= 0.01 * total:
            share, products = (f"{100 * part / total:5.1f}" for part in parts)
            yield f"  {layer or 'outside the network':28} {share} {products}"


def _first_type(text):
    found = re.search(r"\b([a-z]+[0-9]*(?:e\d+m\d+\w*)?)\[", text)
    return found[1] if found else "?"


def main():
    """Compiles the step of a config for a slice and prints the tables."""
    from sit_jax import config as configs
    from sit_jax.parallel.hardware import chip_of
    from sit_jax.parallel.mesh import make_mesh
    from sit_jax.planning import programs

    path, topology, *overrides = sys.argv[1:]
    config = configs.load(path)
    configs.override(config, overrides)
    devices = tpu_compile.get_tpu_devices(topology)
    experiment = programs.build_training_experiment(config)
    mesh = make_mesh(**config.mesh, devices=devices)
    batch, kind = config.batch_size, devices[0].device_kind
    lowered = programs.lower_train_step(config, experiment, mesh, batch, "tpu")
    program = tpu_compile.compile_for_tpu(lowered, devices[0])
    if program is None:
        sys.exit(f"{topology}, batch {batch}: does not fit")
    print(*tpu_compile.describe_program(program, kind=kind), sep="\n")
    wires = chip_of(kind).link_bandwidth
    print(*describe_tables(program.text, wires), sep="\n")


if __name__ == "__main__":
    main()
