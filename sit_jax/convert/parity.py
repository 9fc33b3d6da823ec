"""The original's own network and ours on the same inputs, stage by stage."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np

from sit_jax.convert.model_card import original_arguments
from sit_jax.errors import UserError
from sit_jax.models.dit import DiT
from sit_jax.models.mdt import MDT

MODULES = ("models.py", "masked_diffusion/models.py")  # SiT's and DiT's; MDT's
STAGES = ("patch", "cond", "blocks", "head")  # of our network


def import_original(clone: str | Path) -> ModuleType:
    """Imports the models.py of a clone of the original repository."""
    folder = Path(clone).expanduser()
    path = next((p for p in map(folder.joinpath, MODULES) if p.is_file()), None)
    if path is None:
        missing = folder / MODULES[0]
        raise UserError(f"--reference: no {missing}; give a clone of the original")
    spec = importlib.util.spec_from_file_location("original_models", path)
    assert spec and spec.loader  # as of any .py
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except ImportError as error:
        reason = f"{path}: {error}; install what it needs"
        raise UserError(f"--reference: {reason}") from error
    return module


def build_original(
    module: ModuleType,
    model: DiT | MDT,
    shape: tuple[int, int, int],
    state: Mapping[str, np.ndarray],
) -> Any:
    """Returns the original's torch network with these weights, for evaluation."""
    import torch

    name = type(model).__name__
    if not hasattr(module, name):
        raise UserError(
            f"--reference: {module.__file__} has no {name}, which the weights are of"
        )
    arguments = original_arguments(model, shape)
    arguments["class_dropout_prob"] = 0.1 if model.null_label else 0.0
    if isinstance(model, MDT):
        arguments["mask_ratio"] = model.mask_ratio
    network = getattr(module, name)(**arguments)
    tensors = {name: torch.from_numpy(np.array(state[name])) for name in state}
    network.load_state_dict(tensors, strict=True)
    return network.eval()


def compare_stages(
    module: ModuleType,
    model: DiT,
    shape: tuple[int, int, int],
    state: Mapping[str, np.ndarray],
    params: Mapping[str, Any],
) -> dict[str, float]:
    """Returns the relative L2 difference at each stage, from the input to the output.

    Args:
        module: the original's.
        model: our network.
        shape: (height, width, channels) of its data.
        state: the weights by torch's names.
        params: the same weights as ours.
    """
    if isinstance(model, MDT):
        raise UserError(
            "--reference compares SiT and DiT; for MDT there is "
            "benchmarks/torch_bundle.py"
        )
    inputs = _inputs(model, shape)
    theirs = _run_original(build_original(module, model, shape, state), *inputs)
    ours = _run_ours(model, params, *inputs)
    size = np.linalg.norm
    return {
        name: float(size(np.float64(ours[name]) - stage) / size(np.float64(stage)))
        for name, stage in theirs.items()
    }


def _inputs(model, shape):
    """Returns x [4, h, w, c], t [4], y [4]; first, last and null are among them."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((4, *shape), dtype=np.float32)
    is_discrete = type(model).__name__ == "DiT"
    t = [0, 999, 1, 500] if is_discrete else [0, 1, *rng.random(2)]
    last = model.classes - 1
    y = [model.classes if model.null_label else 0, 0, last, rng.integers(last + 1)]
    return x, np.asarray(t, np.float32), np.asarray(y)


def _run_original(network, x, t, y):
    import torch

    stages = {}
    record = lambda name: lambda _, inputs, out: stages.__setitem__(name, out.numpy())
    network.x_embedder.register_forward_hook(record("patches"))
    network.final_layer.register_forward_hook(
        lambda _, inputs, out: stages.update(
            {"time and label": inputs[1].numpy(), "final layer": out.numpy()}
        )
    )
    for i, block in enumerate(network.blocks):
        block.register_forward_hook(record(f"block {i}"))
    with torch.no_grad():
        x = torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))
        out = network(x, torch.from_numpy(t), torch.from_numpy(y)).numpy()
    order = dict.fromkeys(["patches", "time and label", *stages])
    stages = {name: stages[name] for name in order}
    return stages | {"output": out.transpose(0, 2, 3, 1)}


def _run_ours(model, params, x, t, y):
    with jax.default_matmul_precision("highest"):
        out, state = model.apply(
            {"params": params},
            x,
            t,
            y,
            capture_intermediates=lambda module, _: module.name in STAGES,
            mutable="intermediates",
        )
    patches, cond, blocks, head = (
        state["intermediates"][stage]["__call__"][0] for stage in STAGES
    )
    stages = {"patches": patches.reshape(len(x), -1, model.width)}  # (b, t, d)
    stages |= {f"block {i}": tokens for i, tokens in enumerate(blocks[0])}
    return stages | {"time and label": cond, "final layer": head, "output": out}
