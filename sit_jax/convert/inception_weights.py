"""Where the weights of the 2015 Inception network are found, and how they are read.

Files are PyTorch's (by torch-fidelity or pytorch-fid, the same bytes) or the TensorFlow
graph they were made from. They are converted once, to a safetensors with PyTorch's
names in a cache, and from then on neither torch nor the original is needed.
"""

import contextlib
import dataclasses
import os
from pathlib import Path

from flax.traverse_util import unflatten_dict
from jax import ShapeDtypeStruct

from sit_jax.convert import tensor_files
from sit_jax.convert.graph_files import constants
from sit_jax.convert.pretrained import cache_dir, fetch
from sit_jax.convert.rules import join_names, require_match, to_flax, to_torch
from sit_jax.errors import UserError
from sit_jax.files import atomic_write, read_json, sha256, write_json
from sit_jax.manifest import weights_hash
from sit_jax.models.inception import RULES, SHAPES, TF_RULES

FILE = "pt_inception-2015-12-05-6726825d.pth"
SIZE = 95_628_359  # bytes
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{FILE}"
NAMES = (FILE, "weights-inception-2015-12-05-6726825d.pth")  # the same bytes
GRAPH = "classify_image_graph_def.pb"  # what ADM's evaluator downloads
CONVERTED = "inception-2015-12-05.safetensors"


@dataclasses.dataclass(frozen=True)
class Weights:
    """params: Inception's, numpy; sha256: of their names, shapes and bytes.

    released: whether they came from the released file, by its sha256, or from a graph
    with its names, of which there is only one.
    """

    params: dict
    path: Path
    sha256: str
    released: bool


def load(path=None):
    """-> Weights of the file at path, or of the one that find() finds."""
    path = find(path)
    if path.suffix == ".safetensors":
        return _converted(path)
    sha = sha256(path)
    if path.name in NAMES and sha != SHA256:
        raise UserError(
            f"{path} is damaged: its sha256 is {sha}, not {SHA256}; get it again"
        )
    is_graph = path.suffix == ".pb"
    params = _graph(path) if is_graph else _torch(path)
    weights = Weights(params, path, weights_hash(params), is_graph or sha == SHA256)
    if weights.spec:
        _keep(weights, sha)
    return weights


def find(path=None):
    """-> Path: the one given, or the first of the places where the file may lie."""
    if path is not None:
        path = fetch(path)
        if not path.is_file():
            raise UserError(f"no file at {path}; {_remedy()}")
        return path
    for place in places():
        if place.is_file():
            return place
    raise UserError(f"no Inception weights; {_remedy()}")


def places():
    """Where find() looks: our cache, then what other evaluators downloaded."""
    user = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    hub = Path(os.path.expanduser(os.environ.get("TORCH_HOME") or f"{user}/torch"))
    yield from (cache_dir() / name for name in (CONVERTED, *NAMES))
    yield from (hub / "hub" / "checkpoints" / name for name in NAMES)


def _remedy():
    return (
        f"put {FILE} ({SIZE} bytes, sha256 {SHA256}, {URL}) into {cache_dir()}, or "
        f"name a copy or ADM's {GRAPH} by --inception"
    )


def _torch(path):
    """Any file of tensors under PyTorch's names. Counters of batches are left out."""
    opened = tensor_files.open_file(path)
    content = opened.content()
    if not opened.is_state_dict(content):
        raise UserError(f"{path} is not the state dict of an Inception network")
    names = {n: (n,) for n in content if not n.endswith("num_batches_tracked")}
    return _params(path, RULES, tensor_files.Tensors(opened, names))


def _graph(path):
    found = constants(path)
    mapped = {name for name, _, _ in TF_RULES}
    state = {name: array for name, array in found.items() if name in mapped}
    return _params(path, TF_RULES, state)


def _params(path, rules, state):
    like = {name: ShapeDtypeStruct(shape, "float32") for name, shape in SHAPES.items()}
    try:
        params, spare = to_flax(rules, state)
        require_match(unflatten_dict(like, sep="/"), params)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    if spare:
        listed = join_names(sorted(spare))
        raise UserError(f"{path} is another network: it also has {listed}")
    return params


def _keep(weights, sha):
    """Writes the cache. Where that is not allowed, the original is as good."""
    path, record = cache_dir() / CONVERTED, {"sha256": weights.sha256, "made_from": sha}
    with contextlib.suppress(OSError, UserError):
        write_json(path.with_suffix(".json"), record | {"released": True})
        with atomic_write(path) as name:
            tensor_files.write(name, to_torch(RULES, weights.params))


def _converted(path):
    """A safetensors; beside ours lies the hash that its content must have."""
    params = _torch(path)
    weights = Weights(params, path, weights_hash(params), False)
    record = path.with_suffix(".json")
    if not record.is_file():
        return weights
    known = read_json(record)
    if known.get("sha256") != weights.sha256:
        raise UserError(f"{path} has changed since it was made; remove it")
    return dataclasses.replace(weights, released=known.get("released") is True)
