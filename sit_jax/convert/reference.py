"""The originals' own network and ours on the same inputs, stage by stage."""

import importlib.util
from pathlib import Path

import jax
import numpy as np

from sit_jax.errors import UserError
from sit_jax.models.mdt import MDT

STAGES = ("patch", "cond", "blocks", "head")
PLACES = ("models.py", "masked_diffusion/models.py")  # SiT's and DiT's; MDT's


def original(clone):
    """The models.py of a clone of the original repository, imported."""
    folder = Path(clone).expanduser()
    path = next((p for p in map(folder.joinpath, PLACES) if p.is_file()), None)
    if path is None:
        missing = folder / PLACES[0]
        raise UserError(f"--reference: no {missing}; give a clone of the original")
    found = importlib.util.spec_from_file_location("original_models", path)
    module = importlib.util.module_from_spec(found)
    try:
        found.loader.exec_module(module)
    except ImportError as error:
        raise UserError(
            f"--reference: {path}: {error}; install what it needs"
        ) from error
    return module


def differences(module, model, shape, state, params, seed=0):
    """-> [(stage, relative L2 difference)] of four random inputs, from front to end.

    module: the original's; state: torch's names to arrays; params: the same weights as
    ours. Times and labels include the first, the last and null.
    """
    if isinstance(model, MDT):
        raise UserError(
            "--reference compares SiT and DiT; for MDT there is "
            "benchmarks/torch_bundle.py"
        )
    inputs = _inputs(model, shape, seed)
    theirs = _theirs(network(module, model, shape, state), *inputs)
    ours = _ours(model, params, *inputs)
    return [(stage, _relative(ours[stage], theirs[stage])) for stage in theirs]


def _inputs(model, shape, seed):
    """-> x [4, H, W, C], t [4], y [4]"""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((4, *shape), dtype=np.float32)
    integer = type(model).__name__ == "DiT"
    t = [0, 999, 1, 500] if integer else [0, 1, *rng.random(2)]
    last = model.classes - 1
    y = [model.classes if model.null_label else 0, 0, last, rng.integers(last + 1)]
    return x, np.asarray(t, np.float32), np.asarray(y)


def network(module, model, shape, state):
    """The original's torch network with these weights; state: torch's names."""
    import torch

    name = type(model).__name__
    if not hasattr(module, name):
        raise UserError(
            f"--reference: {module.__file__} has no {name}, which the weights are of"
        )
    more = {}
    if isinstance(model, MDT):
        more = {"mask_ratio": model.mask_ratio, "decode_layer": model.decoder}
    made = getattr(module, name)(
        input_size=shape[0],
        patch_size=model.patch,
        in_channels=shape[2],
        hidden_size=model.width,
        depth=model.depth,
        num_heads=model.heads,
        mlp_ratio=model.mlp_ratio,
        class_dropout_prob=0.1 if model.null_label else 0.0,
        num_classes=model.classes,
        learn_sigma=model.learn_sigma,
        **more,
    )
    tensors = {name: torch.from_numpy(np.array(state[name])) for name in state}
    made.load_state_dict(tensors, strict=True)
    return made.eval()


def _theirs(torch_network, x, t, y):
    import torch

    stages = {}
    keep = lambda name: lambda _, inputs, out: stages.__setitem__(name, out.numpy())
    torch_network.x_embedder.register_forward_hook(keep("patches"))
    torch_network.final_layer.register_forward_hook(
        lambda _, inputs, out: stages.update(
            {"time and label": inputs[1].numpy(), "final layer": out.numpy()}
        )
    )
    for i, block in enumerate(torch_network.blocks):
        block.register_forward_hook(keep(f"block {i}"))
    with torch.no_grad():
        x = torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))
        out = torch_network(x, torch.from_numpy(t), torch.from_numpy(y)).numpy()
    order = ["patches", "time and label", *stages]
    found = {name: stages[name] for name in dict.fromkeys(order)}
    return found | {"output": out.transpose(0, 2, 3, 1)}


def _ours(model, params, x, t, y):
    with jax.default_matmul_precision("highest"):
        out, seen = model.apply(
            {"params": params},
            *(x, t, y),
            capture_intermediates=lambda module, _: module.name in STAGES,
            mutable="intermediates",
        )
    patches, cond, blocks, head = (
        seen["intermediates"][stage]["__call__"][0] for stage in STAGES
    )
    named = ((f"block {i}", tokens) for i, tokens in enumerate(blocks[0]))
    ends = {"time and label": cond, "final layer": head, "output": out}
    return {"patches": patches.reshape(len(x), -1, model.width), **dict(named), **ends}


def _relative(ours, theirs):
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))
