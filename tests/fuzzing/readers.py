"""The readers of files from elsewhere, each with small files that are in order.

Whatever the bytes, a reader returns or raises a UserError.
"""

import argparse
import contextlib
import io
import json
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import safetensors.numpy
import torch
from PIL import Image

from sit_jax import files
from sit_jax.config import from_json
from sit_jax.convert import peft
from sit_jax.convert.inception import read_graph_constants
from sit_jax.convert.state_dict import read_torch_file
from sit_jax.convert.vae import read_vae_config
from sit_jax.data.archives import read_members
from sit_jax.data.images import to_rgb
from sit_jax.data.latent_cache import (
    CacheMetadata,
    EncodedImages,
    LatentCache,
    parse_metadata,
    read_last_record,
    write_shard,
)
from sit_jax.diagnosis import bundle
from sit_jax.errors import UserError, one_line
from sit_jax.evaluation.image_sets import open_input
from sit_jax.sampling import job
from sit_jax.sampling.outputs import ArrayFile, load_npy

SPACE = Path("/dev/shm") if Path("/dev/shm").is_dir() else None  # no disk is worn


def pt(path):
    file = read_torch_file(path)
    for part in file.parts().values():
        dict(part.items()) if hasattr(part, "items") else part


def npz(path):
    file = ArrayFile(path)
    for name in file.names[:8]:
        file.array(name)


def judged(path):
    """What evaluate.py may be given."""
    side = open_input(path)
    if side.stored is not None:
        list(side.stored.batches())
    elif side.images is not None:
        for _ in zip(side.images.batches(2), range(2), strict=False):
            pass


def manifest(path):
    found, _ = job.read_manifest(path)
    assert found.digest


def config(path):
    from_json(files.read_json(path))


def metadata(path):
    found = parse_metadata(files.read_json(path), path)
    found.shard_ids(0)


def vae_config(path):
    read_vae_config(path)


def adapter_config(path):
    safetensors.numpy.save_file(LORA, path.parent / peft.WEIGHTS)
    path.rename(path.parent / peft.CONFIG)
    peft.read_adapter_files(path.parent)


def adapter(path):
    peft.read_adapter_files(path)


def bundled(path):
    bundle.read_record(path)


def tar(path):
    for member in read_members(path)[:8]:
        member.read()


def image(path):
    to_rgb(path.read_bytes())


def shard(path):
    with contextlib.suppress(UserError):
        read_last_record(path)
    folder = path.parent
    if path.name != METADATA.shard_name(0):
        path.rename(folder / METADATA.shard_name(0))
    about = {"tags": vars(METADATA), "images": [1], "class_names": []}
    (folder / "cache.json").write_text(json.dumps(about))
    LatentCache(folder)[0]


def written(write, ending=""):
    """The bytes that write(path) leaves."""
    with tempfile.TemporaryDirectory(dir=SPACE) as folder:
        path = Path(folder) / f"x{ending}"
        write(path)
        return path.read_bytes()


def as_json(value):
    return [json.dumps(value).encode()]


def pt_files():
    state = {"a.weight": torch.ones(2, 3), "b": torch.ones(1)}
    whole = {"model": state, "ema": state, "args": argparse.Namespace(model="x", n=3)}
    for content in (state, whole):
        for zipped in (True, False):
            save = lambda path, content=content, zipped=zipped: torch.save(
                content, path, _use_new_zipfile_serialization=zipped
            )
            yield written(save)


def npz_files():
    for save in (np.savez, np.savez_compressed):
        images = np.arange(96, dtype=np.uint8).reshape(2, 4, 4, 3)
        yield written(lambda path, s=save, i=images: s(path, arr_0=i), ".npz")
    pools = {"pool": np.ones((3, 4), np.float32), "record": np.array('{"a": 1}')}
    yield written(lambda path: np.savez(path, **pools), ".npz")
    mu = {"mu": np.ones(2), "sigma": np.eye(2)}
    yield written(lambda path: np.savez(path, **mu), ".npz")


def npy_files():
    yield written(lambda path: np.save(path, np.ones((2, 3), np.float32)), ".npy")


def images():
    picture = Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3))
    for kind in ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "PPM"):
        file = io.BytesIO()
        picture.save(file, kind)
        yield file.getvalue()


def tars():
    for kind in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w", format=kind) as archive:
            for name in ("a/b.png", "long" * 40 + "ö.cls"):
                info = tarfile.TarInfo(name)
                info.size = 3
                archive.addfile(info, io.BytesIO(b"123"))
        yield file.getvalue()


def shards():
    def write(path):
        images = EncodedImages([3], [1], np.ones((2, 1, 2, 2, 8), np.float32))
        write_shard(path.parent, METADATA, 0, [images])
        (path.parent / METADATA.shard_name(0)).rename(path)

    yield written(write)


def manifests():
    made = job.SamplingJob(
        "x", {"make": {"name": "sit_jax.diffusion.paths.linear"}}, np.arange(3)
    )
    return as_json({"job": made.to_json(), "weights_sha256": "ab"})


def graphs():
    """A GraphDef of one node Const named a, float32 [2]."""
    field = lambda number, data: bytes([number << 3 | 2, len(data)]) + data
    shape = field(2, field(2, b"\x08\x02"))
    tensor = b"\x08\x01" + shape + field(4, np.ones(2, "<f4").tobytes())
    value = field(1, b"value") + field(2, field(8, tensor))
    yield field(1, field(1, b"a") + field(2, b"Const") + field(5, value))


METADATA = CacheMetadata(
    kind="moments",
    shape=(2, 2, 8),
    dtype="float32",
    views=2,
    precision="exact",
    scale=0.18,
    records=9,
    classes=3,
    shards=2,
)
ADAPTER = {
    "peft_type": "LORA",
    "r": 4,
    "rank_pattern": {"attn.qkv": 2},
    "lora_alpha": 1,
}
LORA = {
    f"base_model.model.blocks.0.attn.qkv.lora_{k}.weight": np.ones(s, np.float32)
    for k, s in (("A", (2, 8)), ("B", (24, 2)))
}
VAE = {"block_out_channels": [8, 16], "norm_num_groups": 4, "scaling_factor": 0.2}
BUNDLE = {"format": bundle.FORMAT, **{k: kind() for k, kind in bundle.KEYS.items()}}
SAFE = {"a": np.ones((2, 3), np.float32), "b": np.zeros(1, np.float16)}
READERS = {  # name: ending of the file, its reader, files in order
    "pt": (".pt", pt, pt_files),
    "safetensors": (".safetensors", pt, lambda: [safetensors.numpy.save(SAFE)]),
    "npz": (".npz", npz, npz_files),
    "npy": (".npy", load_npy, npy_files),
    "judged": (".npz", judged, npz_files),
    "manifest": (".json", manifest, manifests),
    "config": (".json", config, lambda: as_json({"a": {"name": "optax.adamw"}})),
    "metadata": (".json", metadata, lambda: as_json(vars(METADATA))),
    "vae_config": (".json", vae_config, lambda: as_json(VAE)),
    "adapter_config": (".json", adapter_config, lambda: as_json(ADAPTER)),
    "adapter": (".safetensors", adapter, lambda: [safetensors.numpy.save(LORA)]),
    "bundle": (".json", bundled, lambda: as_json(BUNDLE)),
    "shard": (".array_record", shard, shards),
    "image": (".png", image, images),
    "tar": (".tar", tar, tars),
    "graph": (".pb", read_graph_constants, graphs),
}


def check(name, data):
    """Runs a reader over the bytes of a file; anything but a UserError is raised."""
    ending, read, _ = READERS[name]
    with tempfile.TemporaryDirectory(dir=SPACE) as folder:
        path = Path(folder) / f"x{ending}"
        path.write_bytes(data)
        try:
            read(path)
        except UserError as error:
            one_line(error).encode()
