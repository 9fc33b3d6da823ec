"""What a compiled program says of itself, read from its text (XLA's HLO).

Collectives are counted once for each channel: the compiler repeats one that it spreads
over several steps of computation, and of these the rarest counts. How often one runs
follows from the loops around it, whose number of turns the compiler notes, or is the
constant that their condition compares with. A loop that tells neither counts once.
"""

import collections
import math
import re
from typing import NamedTuple

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)
_PRODUCTS = {"dot", "convolution"}
_CONTROL = {"while", "body", "closed_call", "checkpoint", "rematted_computation"}
_BYTES = {"pred": 1, "bf16": 2, "f16": 2, "s64": 8, "u64": 8, "f64": 8}
_ARRAY = re.compile(r"\b([a-z]+[0-9]*(?:e\d+m\d+\w*)?)\[([0-9,]*)\]")
_LINE = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\((.*)$")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)")
_TURNS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_GROUP = re.compile(r"replica_groups=(?:\{\{([\d,]+)\}|\[(?:\d+,)?(\d+)\]<=)")
_OF_MESH = re.compile(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}")
_BRANCHES = re.compile(r"branch_computations=\{(.*?)\}")


class Line(NamedTuple):
    name: str
    type: str
    op: str
    rest: str  # operands and attributes


class Collective(NamedTuple):
    kind: str
    bytes: int  # of its result on one device
    times: int  # in one run of the program
    name: str  # of the operation that it is for
    devices: int = 0  # that take part together; 0: the program does not say


class Product(NamedTuple):
    left: str  # types of the operands
    right: str
    out: str
    precision: str  # as asked: default, high, highest


def collectives(text):
    """-> [Collective] of a program, as often as it is written down."""
    program = _computations(text)
    times, found = _times(program), {}
    for name, lines in program.items():
        for line in lines:
            kind = line.op.removesuffix("-start")
            if kind in KINDS and times[name]:
                channel = re.search(r"channel_id=(\d+)", line.rest)
                key = channel[1] if channel else (name, line.name)
                told = re.search(r'op_name="(.*?)"', line.rest)
                size, word = _moved(line), told[1] if told else ""
                each = Collective(kind, size, times[name], word, _group(line))
                found[key] = min(found.get(key, each), each, key=lambda c: c.times)
    return list(found.values())


def by_kind(found):
    """-> {kind: (collectives written down, times run, bytes in all)}"""
    table = {kind: [0, 0, 0] for kind in KINDS}
    for each in found:
        row = table[each.kind]
        row[0], row[1] = row[0] + 1, row[1] + each.times
        row[2] += each.times * each.bytes
    return {kind: tuple(row) for kind, row in table.items() if row[0]}


def sent(found):
    """-> bytes that a device sends for collectives in a run, in rings.

    Of n devices each sends (n - 1) / n of a gathered array, which is nearly all of it,
    and for a sum that all get twice that. What is scattered is told by its small
    result, of which each sends one for every other device.
    """
    return sum(_weight(each) * each.bytes * each.times for each in found)


def _weight(each):
    if each.kind == "reduce-scatter":
        return max(each.devices - 1, 1)
    return 2 if each.kind == "all-reduce" else 1


def products(text):
    """-> Counter of the Products (dots and convolutions) that are written down."""
    found = collections.Counter()
    for lines in _computations(text).values():
        types = {line.name: _first_type(line.type) for line in lines}
        for line in lines:
            if line.op in _PRODUCTS:
                operands = re.findall(r"%([\w.\-]+)", line.rest.partition(")")[0])
                left, right = (types.get(name, "?") for name in operands[:2])
                asked = re.search(r"operand_precision=\{(\w+)", line.rest)
                precision = asked[1] if asked else "default"
                found[Product(left, right, types[line.name], precision)] += 1
    return found


def cycles(text):
    """-> cycles of a run by the compiler's own reckoning, which TPU programs carry.

    One operation after the other, loops counted, without waiting for other chips.
    """
    return sum(count for count, _, _ in _reckoned(text))


def by_layer(text):
    """-> {layer: (cycles, of these in products)}, the most first.

    A fusion counts for the layer that it is named after. What is in no layer, such as
    what loops keep, is the network's; what is in no network, such as the optimizer, has
    no name.
    """
    table = collections.defaultdict(lambda: [0, 0])
    for count, layer, multiplies in _reckoned(text):
        table[layer][0] += count
        table[layer][1] += count * multiplies
    rows = sorted(table.items(), key=lambda row: -row[1][0])
    return {layer: tuple(row) for layer, row in rows}


def _reckoned(text):
    """Yields (cycles in a run, layer, whether it multiplies matrices)."""
    program = _computations(text)
    times = _times(program)
    for name, lines in program.items():
        for line in lines:
            told = re.search(r'"estimated_cycles":"(\d+)"', line.rest)
            if not told or not times[name]:
                continue
            named = re.search(r'op_name="(.*?)"', line.rest)
            inside = re.search(r"calls=%?([\w.\-]+)", line.rest)
            ops = {each.op for each in program.get(inside[1], ())} if inside else set()
            multiplies = bool(_PRODUCTS & {line.op, *ops})
            layer = _layer(named[1]) if named else ""
            yield times[name] * int(told[1]), layer, multiplies


def _layer(name):
    """blocks/mlp/fc1 of jit(step)/jvp(SiT)/SiT/while/body/blocks/mlp/fc1/dot_general

    SiT, if it is in the network and in no layer of it; else nothing.
    """
    name = name.partition(";")[0]
    words = re.sub(r"\bcond/branch_\w+/", "", name).split("/")[1:-1]
    words = [w for w in words if w.isidentifier() and w not in _CONTROL]
    network = re.search(r"jvp\((\w+)\)", name)
    if network and words[:1] in ([], [network[1]]):
        words = words[1:] or [network[1]]
    return "/".join(words)


def aliased(text):
    """-> how many outputs take the memory of an input that was given away."""
    first = text.partition("\n")[0]
    begin = first.find("input_output_alias={")
    if begin < 0:
        return 0
    return len(re.findall(r"(?:may|must)-alias", first[begin:]))


def _computations(text):
    """-> {name: [Line]}; the one that the program begins with under ''."""
    program, lines = {}, None
    for row in text.splitlines():
        if head := _HEAD.match(row):
            lines = program.setdefault("" if head[1] else head[2], [])
        elif lines is not None and (line := _LINE.match(row)):
            lines.append(Line(*line.groups()))
    return program


def _times(program):
    """-> {computation: how often a run goes through it}"""
    times = collections.Counter()

    def visit(name, count):
        times[name] += count
        for line in program.get(name, ()):
            turns = _turns(program, line) if line.op == "while" else 1
            for called in _CALLED.findall(line.rest):
                visit(called, count * turns)
            for branches in _BRANCHES.findall(line.rest):
                for called in re.findall(r"[\w.\-]+", branches):
                    visit(called, count)

    visit("", 1)
    return times


def _turns(program, loop):
    if noted := _TURNS.search(loop.rest):
        return int(noted[1])
    condition = re.search(r"condition=%?([\w.\-]+)", loop.rest)
    lines = program.get(condition[1], ()) if condition else ()
    numbers = [line.rest.partition(")")[0] for line in lines if line.op == "constant"]
    counts = [int(number) for number in numbers if number.isdecimal()]
    return counts[0] if len(counts) == 1 else 1


def _moved(line):
    """Bytes of the results; the -start of some holds operands, results and numbers."""
    both = line.op.endswith("-start") and not line.op.startswith("all-reduce")
    arrays = [array for array in _ARRAY.findall(line.type) if array[1] or not both]
    return sum(_size(*array) for array in arrays[both * len(arrays) // 2 :])


def _group(line):
    """How many devices a collective is among, of groups that are all as large."""
    if found := _OF_MESH.search(line.rest):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", found[2]))
    found = _GROUP.search(line.rest)
    if not found:
        return 0
    return int(found[2]) if found[2] else len(found[1].split(","))


def _size(type, dims):
    width = _BYTES.get(type) or max(1, int(re.search(r"\d+|$", type)[0] or 32) // 8)
    return width * math.prod(int(n) for n in dims.split(",") if n)


def _first_type(type):
    found = _ARRAY.search(type)
    return found[1] if found else "?"
