"""The original PyTorch code beside ours: its modules, whatever of timm there is.

SiT, DiT, fast-DiT and MDT take layers from timm, which needs torchvision. Where these
do not import, they stand here, as timm 1.0 computes them: attention by PyTorch's
scaled_dot_product_attention.
"""

import importlib
import sys
import types
from pathlib import Path

from torch import nn


def load(folder, *names):
    """Imports modules of a clone of the original, by their names in it."""
    folder = str(Path(folder).resolve())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    _timm()
    sys.modules.setdefault("torchvision", types.ModuleType("torchvision"))
    return [importlib.import_module(name) for name in names]


class PatchEmbed(nn.Module):
    def __init__(self, side, patch, channels, width, bias=True):
        super().__init__()
        self.patch_size = (patch, patch)
        self.num_patches = (side // patch) ** 2
        self.proj = nn.Conv2d(channels, width, patch, patch, bias=bias)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    def __init__(self, dim, num_heads=8, qkv_bias=False, **unused):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        b, t, d = x.shape
        qkv = self.qkv(x).reshape(b, t, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        x = nn.functional.scaled_dot_product_attention(*qkv.unbind(0))
        return self.proj(x.transpose(1, 2).reshape(b, t, d))


class Mlp(nn.Module):
    def __init__(self, in_features, hidden_features, act_layer=nn.GELU, **unused):
        super().__init__()
        self.fc1 = nn.Linear(in_features, hidden_features)
        self.act = act_layer()
        self.fc2 = nn.Linear(hidden_features, in_features)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


def _timm():
    try:
        import timm.models.vision_transformer  # noqa: F401

        return
    except ImportError:
        pass
    for name in [name for name in sys.modules if name.split(".")[0] == "timm"]:
        del sys.modules[name]  # what the failed import left
    stand_in = types.ModuleType("timm.models.vision_transformer")
    small = types.ModuleType("timm.models.layers")
    small.trunc_normal_ = nn.init.trunc_normal_
    sys.modules["timm.models.layers"] = small
    stand_in.PatchEmbed, stand_in.Attention, stand_in.Mlp = PatchEmbed, Attention, Mlp
    for name in ("timm", "timm.models"):
        sys.modules[name] = types.ModuleType(name)
    sys.modules["timm.models.vision_transformer"] = stand_in
