"""An adapter under torch's names: a pair of matrices for each adapted module.

diffusers' DiT has three modules where the originals have one for q, k and v. Both
ways are exact: cut, the three share `down` and each has its rows of `up`; joined, the
ranks add up, and `up` is made of blocks.
"""

import dataclasses
import re

import numpy as np

from sit_jax.adapters.weights import LoRAWeight, is_matrix
from sit_jax.convert.rules import join_names
from sit_jax.errors import UserError

DIFFUSERS = {  # the originals' names -> those of diffusers' DiTTransformer2DModel
    "blocks.*.attn.proj": "transformer_blocks.*.attn1.to_out.0",
    "blocks.*.mlp.fc1": "transformer_blocks.*.ff.net.0.proj",
    "blocks.*.mlp.fc2": "transformer_blocks.*.ff.net.2",
    "blocks.*.adaLN_modulation.1": "transformer_blocks.*.norm1.linear",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
QKV = "blocks.*.attn.qkv"
PARTS = [f"transformer_blocks.*.attn1.to_{part}" for part in "qkv"]


@dataclasses.dataclass(frozen=True)
class Pair:
    """W + scale * up @ down of a torch weight [out, in], its rows of given length."""

    down: np.ndarray  # [rank, in]
    up: np.ndarray  # [out, rank]
    scale: float = 1.0
    magnitude: np.ndarray | None = None  # [out]

    @property
    def rank(self):
        return len(self.down)

    def at_scale(self, scale):
        """The same with another scale, to the rounding of one product."""
        if scale == self.scale:
            return self
        up = (self.up * np.float32(self.scale / scale)).astype(np.float32)
        return dataclasses.replace(self, up=up, scale=scale)

    def at_rank(self, rank):
        """The same with rows and columns of zeros up to a rank."""
        more = (0, rank - self.rank)
        down, up = np.pad(self.down, (more, (0, 0))), np.pad(self.up, ((0, 0), more))
        return dataclasses.replace(self, down=down, up=up)


def pairs(rules, flat):
    """Our adapters by path -> {torch module: Pair}, in the order of the rules."""
    found = {}
    for torch_name, path, _ in rules:
        node = flat.get(path)
        if not isinstance(node, LoRAWeight):
            continue
        module, stacked = torch_name.removesuffix(".weight"), "*" in torch_name
        count = len(node.lora_a) if stacked else 1
        for i in range(count):
            at = i if stacked else ...
            mats = (
                np.ascontiguousarray(np.asarray(m)[at].T)
                for m in (node.lora_a, node.lora_b)
            )
            length = None if node.magnitude is None else np.asarray(node.magnitude)[at]
            found[module.replace("*", str(i))] = Pair(*mats, node.scale, length)
    return found


def adapters(rules, shapes, found, where):
    """{torch module: Pair} -> our adapters by path, without a base.

    shapes: of the base's parameters by path. All get the largest rank and one scale;
    a layer that has none gets zeros. Modules of another network are refused.
    """
    if not found:
        raise UserError(f"{where} holds no adapter")
    rank = max(pair.rank for pair in found.values())
    scale, left, flat = next(iter(found.values())).scale, dict(found), {}
    for torch_name, path, _ in rules:
        if not is_matrix(path):
            continue
        module, stacked = torch_name.removesuffix(".weight"), "*" in torch_name
        *lead, fan_in, fan_out = shapes[path].shape
        names = [module.replace("*", str(i)) for i in range(lead[0] if lead else 1)]
        own = [left.pop(name, None) for name in names]
        if not any(own):
            continue
        for name, pair in zip(names, own, strict=True):
            _require_size(where, name, pair, fan_in, fan_out)
        flat[path] = _stacked(where, module, own, rank, scale, stacked, shapes[path])
    if left:
        raise UserError(
            f"{where} is for another network: this one has no {join_names([*left], 3)}"
        )
    return flat


def to_diffusers(found):
    """Pairs by the originals' names -> by those of diffusers' DiT, all of scale 1."""
    named = {}
    for name, pair in found.items():
        pattern = re.sub(r"\.\d+\.", ".*.", name, count=1)
        number = re.search(r"\.(\d+)\.", name)
        put = lambda to, n=number: to.replace("*", n[1]) if n else to
        pair = pair.at_scale(1.0)
        if pattern == QKV:
            parts = zip(PARTS, _cut(pair), strict=True)
            named |= {put(to): part for to, part in parts}
        elif pattern in DIFFUSERS or name in DIFFUSERS:
            named[put(DIFFUSERS.get(pattern) or DIFFUSERS[name])] = pair
        else:
            raise UserError(
                f"diffusers' DiT has no one module for {name}; write PEFT's files "
                "(--adapter peft), which keep the originals' names"
            )
    return named


def from_diffusers(found):
    """The other way round. Names that diffusers' DiT does not have stay as they are."""
    named, thirds = {}, {}
    back = {theirs: ours for ours, theirs in DIFFUSERS.items()}
    for name, pair in found.items():
        pattern = re.sub(r"(?<=^transformer_blocks\.)\d+", "*", name)
        number = re.search(r"\.(\d+)\.", name)
        if pattern in PARTS:
            thirds.setdefault(QKV.replace("*", number[1]), {})[PARTS.index(pattern)] = (
                pair
            )
        elif pattern in back:
            ours = back[pattern]
            named[ours.replace("*", number[1]) if "*" in ours else ours] = pair
        else:
            named[name] = pair
    return named | {name: _joined(name, parts) for name, parts in thirds.items()}


def _cut(pair):
    ups = np.split(pair.up, 3)
    lengths = [None] * 3 if pair.magnitude is None else np.split(pair.magnitude, 3)
    return [
        dataclasses.replace(pair, up=up, magnitude=length)
        for up, length in zip(ups, lengths, strict=True)
    ]


def _joined(name, parts):
    """{0: q, 1: k, 2: v}, of which some may lack -> Pair of the fused module."""
    first = next(iter(parts.values()))
    if first.magnitude is not None and len(parts) < 3:
        raise UserError(f"{name}: lengths of q, k and v are needed, or of none")
    parts = {i: pair.at_scale(first.scale) for i, pair in parts.items()}
    out, width = len(first.up), first.down.shape[1]
    for pair in parts.values():
        if (len(pair.up), pair.down.shape[1]) != (out, width):
            raise UserError(f"{name}: the adapters of q, k and v differ in size")
    lengths = [parts[i].magnitude for i in sorted(parts)]
    length = None if lengths[0] is None else np.concatenate(lengths)
    same = all(np.array_equal(pair.down, first.down) for pair in parts.values())
    downs = [first.down] if same else [parts[i].down for i in sorted(parts)]
    up = np.zeros((3 * out, sum(map(len, downs))), np.float32)
    column = 0
    for i in sorted(parts):
        rank = parts[i].rank
        up[i * out : (i + 1) * out, column : column + rank] = parts[i].up
        column += 0 if same else rank
    return Pair(np.concatenate(downs), up, first.scale, length)


def _require_size(where, name, pair, fan_in, fan_out):
    if pair is None:
        return
    found = (len(pair.up), pair.down.shape[1])
    if found != (fan_out, fan_in) or pair.up.shape[1] != pair.rank:
        raise UserError(
            f"{where} is for another network: {name} is {found[0]} x {found[1]} there, "
            f"{fan_out} x {fan_in} here"
        )


def _stacked(where, module, own, rank, scale, stacked, shape):
    """One LoRAWeight, without its base, of a module's pairs in all layers."""
    *_, fan_in, fan_out = shape.shape
    lengths = [pair and pair.magnitude for pair in own]
    if any(x is not None for x in lengths) and any(x is None for x in lengths):
        raise UserError(f"{where}: {module} has lengths (DoRA) in some layers only")
    none = Pair(np.zeros((0, fan_in), np.float32), np.zeros((fan_out, 0), np.float32))
    own = [(pair or none).at_scale(scale).at_rank(rank) for pair in own]
    gather = lambda rows: np.stack(rows) if stacked else rows[0]
    down, up = gather([p.down.T for p in own]), gather([p.up.T for p in own])
    length = None if lengths[0] is None else gather(lengths)
    return LoRAWeight(None, down, up, length, scale=scale)
