"""Records how a run or a set of samples was made, and on what."""

import hashlib
import platform
import sys
from importlib import metadata
from typing import Any

import jax
import numpy as np

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "diffrax", "numpy")


def environment() -> dict[str, Any]:
    """Returns versions, devices and the settings of JAX that can change a number."""
    device = jax.devices()[0]
    return {
        "command": sys.argv,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "platform": device.platform,
        "device": device.device_kind,
        "devices": jax.device_count(),
        "hosts": jax.process_count(),
        "matmul_precision": jax.config.jax_default_matmul_precision or "default",
        "threefry_partitionable": jax.config.jax_threefry_partitionable,
    }


def weights_hash(params: Any) -> str:
    """Returns the SHA-256 of names, shapes and bytes of all tensors, sorted by name."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        array = np.ascontiguousarray(leaf)
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        digest.update(f"{name} {array.shape} {array.dtype}".encode())
        digest.update(array.data)
    return digest.hexdigest()


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
