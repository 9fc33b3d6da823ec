"""Finds and reads the weights of the 2015 Inception network.

Files are PyTorch's (by torch-fidelity or pytorch-fid, the same bytes) or the TensorFlow
graph they were made from. They are converted once, to a safetensors with PyTorch's
names in a cache, and from then on neither torch nor the original is needed.
"""

import contextlib
import dataclasses
import math
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from sit_jax.checkpoint import require_same_shapes
from sit_jax.convert import tensor_files
from sit_jax.convert.pretrained import PRETRAINED, cache_dir, fetch
from sit_jax.convert.rules import join_names, to_flax, to_torch
from sit_jax.errors import UserError
from sit_jax.files import atomic_write, read_json, sha256, write_json
from sit_jax.manifest import weights_hash
from sit_jax.models.inception import RULES, TF_RULES, param_shapes

PUBLISHED = PRETRAINED["inception"]
SIZE, SHA256, URL = PUBLISHED.size, PUBLISHED.sha256, PUBLISHED.url
FILE = URL.rpartition("/")[2]
NAMES = (FILE, "weights-inception-2015-12-05-6726825d.pth")  # the same bytes
GRAPH = "classify_image_graph_def.pb"  # what ADM's evaluator downloads
CONVERTED = "inception-2015-12-05.safetensors"
MAX_VALUES = 2**28  # of a constant in a graph


@dataclasses.dataclass(frozen=True)
class InceptionWeights:
    """Weights of Inception and where they come from.

    params: numpy. sha256: of their names, shapes and bytes. is_published: whether they
    came from the published file, by its sha256, or from a graph with its names, of
    which there is only one.
    """

    params: dict
    path: Path
    sha256: str
    is_published: bool


def load_inception(path: str | Path | None = None) -> InceptionWeights:
    """Loads a file, or the one that find_inception finds.

    Raises:
      UserError: there is none, it is damaged, or another network.
    """
    path = find_inception(path)
    if path.suffix == ".safetensors":
        return _load_converted(path)
    digest = sha256(path)
    if path.name in NAMES and digest != SHA256:
        raise UserError(
            f"{path} is damaged: its sha256 is {digest}, not {SHA256}; get it again"
        )
    is_graph = path.suffix == ".pb"
    params = _read_graph(path) if is_graph else _read_torch(path)
    is_published = is_graph or digest == SHA256
    weights = InceptionWeights(params, path, weights_hash(params), is_published)
    if is_published:
        _save_converted(weights, digest)
    return weights


def find_inception(path: str | Path | None = None) -> Path:
    """Returns the path given, or the first of places() where the file lies."""
    if path is not None:
        path = fetch(path)
        if not path.is_file():
            raise UserError(f"no file at {path}; {_remedy()}")
        return path
    for candidate in places():
        if candidate.is_file():
            return candidate
    raise UserError(f"no Inception weights; {_remedy()}")


def places() -> Iterator[Path]:
    """Yields where the file may lie: our cache, then those of other evaluators."""
    user = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    hub = Path(os.path.expanduser(os.environ.get("TORCH_HOME") or f"{user}/torch"))
    yield from (cache_dir() / name for name in (CONVERTED, *NAMES))
    yield from (hub / "hub" / "checkpoints" / name for name in NAMES)


def read_graph_constants(path: str | Path) -> dict[str, np.ndarray]:
    """Returns the float32 constants of a frozen TensorFlow graph (.pb) by name.

    TensorFlow is not needed, and nothing in the file is run.

    Raises:
      UserError: it is damaged, or no such graph.
    """
    from google.protobuf.message import DecodeError
    from tensorboardX.proto.graph_pb2 import GraphDef
    from tensorboardX.proto.types_pb2 import DT_FLOAT

    try:
        nodes = GraphDef.FromString(Path(path).read_bytes()).node
        tensors = {
            node.name: node.attr["value"].tensor for node in nodes if node.op == "Const"
        }
        constants = {
            name: _to_array(tensor)
            for name, tensor in tensors.items()
            if tensor.dtype == DT_FLOAT
        }
    except (DecodeError, ValueError) as error:
        raise UserError(f"{path} is damaged or no TensorFlow graph") from error
    if not constants:
        raise UserError(f"{path} is no TensorFlow graph with float32 constants")
    return constants


def _to_array(tensor):
    shape = [dim.size for dim in tensor.tensor_shape.dim]
    if math.prod(shape) > MAX_VALUES or min(shape, default=0) < 0:
        raise ValueError("no constant of a network")
    content = tensor.tensor_content
    values = np.frombuffer(content, "<f4") if content else np.float32(tensor.float_val)
    if len(values) == 1:  # stands for all of them
        return np.full(shape, values[0])
    return values.reshape(shape)


def _remedy():
    return (
        f"put {FILE} ({SIZE} bytes, sha256 {SHA256}, {URL}) into {cache_dir()}, or "
        f"name a copy or ADM's {GRAPH} by --inception"
    )


def _read_torch(path):
    """Any file of tensors under PyTorch's names. Counters of batches are left out."""
    opened = tensor_files.open_file(path)
    content = opened.content()
    if not opened.is_state_dict(content):
        raise UserError(f"{path} is not the state dict of an Inception network")
    names = {n: (n,) for n in content if not n.endswith("num_batches_tracked")}
    return _to_params(path, RULES, tensor_files.Tensors(opened, names))


def _read_graph(path):
    constants = read_graph_constants(path)
    names = {name for name, _, _ in TF_RULES}
    state = {name: array for name, array in constants.items() if name in names}
    return _to_params(path, TF_RULES, state)


def _to_params(path, rules, state):
    try:
        params, spare = to_flax(rules, state)
        require_same_shapes("weights", params, param_shapes())
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    if spare:
        names = join_names(sorted(spare))
        raise UserError(f"{path} is another network: it also has {names}")
    return params


def _save_converted(weights, digest):
    """Writes the cache. Where that is not allowed, the original is as good."""
    path = cache_dir() / CONVERTED
    record = {"sha256": weights.sha256, "made_from": digest, "released": True}
    with contextlib.suppress(OSError, UserError):
        write_json(path.with_suffix(".json"), record)
        with atomic_write(path) as name:
            tensor_files.write(name, to_torch(RULES, weights.params))


def _load_converted(path):
    """A safetensors; beside ours lies the hash that its content must have."""
    params = _read_torch(path)
    weights = InceptionWeights(params, path, weights_hash(params), False)
    record_file = path.with_suffix(".json")
    if not record_file.is_file():
        return weights
    record = read_json(record_file)
    if record.get("sha256") != weights.sha256:
        raise UserError(f"{path} has changed since it was made; remove it")
    return dataclasses.replace(weights, is_published=record.get("released") is True)
