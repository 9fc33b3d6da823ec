"""The network of SiT and DiT in plain torch, with the originals' names and arguments.

Stands where a clone of an original repository would.
"""

import math

import torch
from torch import nn

from sit_jax.models.layers import sincos_pos_embed_2d


class Named(nn.Module):
    """Holds submodules under the names that a state dict gives them."""

    def __init__(self, **modules):
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)


def normed(x):
    return nn.functional.layer_norm(x, x.shape[-1:], eps=1e-6)


class Patches(Named):
    def __init__(self, channels, width, patch):
        super().__init__(proj=nn.Conv2d(channels, width, patch, stride=patch))

    def forward(self, x):
        return self.proj(x).flatten(2).mT


class Times(Named):
    def __init__(self, width):
        layers = nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width)
        super().__init__(mlp=nn.Sequential(*layers))

    def forward(self, t):
        exponent = -math.log(10_000) * torch.arange(128, dtype=torch.float32) / 128
        angles = t[:, None] * exponent.exp()
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1))


class Labels(Named):
    def __init__(self, rows, width):
        super().__init__(embedding_table=nn.Embedding(rows, width))

    def forward(self, y):
        return self.embedding_table(y)


def modulation(parts, width):
    return nn.Sequential(nn.SiLU(), nn.Linear(width, parts * width))


class Block(nn.Module):
    def __init__(self, width, heads, hidden):
        super().__init__()
        qkv, proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        fc1, fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.attn, self.mlp = Named(qkv=qkv, proj=proj), Named(fc1=fc1, fc2=fc2)
        self.adaLN_modulation, self.heads = modulation(6, width), heads

    def forward(self, x, c):
        shift1, scale1, gate1, shift2, scale2, gate2 = (
            m[:, None] for m in self.adaLN_modulation(c).chunk(6, dim=-1)
        )
        x = x + gate1 * self.attend(normed(x) * (1 + scale1) + shift1)
        hidden = self.mlp.fc1(normed(x) * (1 + scale2) + shift2)
        return x + gate2 * self.mlp.fc2(nn.functional.gelu(hidden, approximate="tanh"))

    def attend(self, x):
        n, tokens, width = x.shape
        qkv = self.attn.qkv(x).view(n, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        weights = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(dim=-1)
        return self.attn.proj((weights @ v).mT.reshape(n, width, tokens).mT)


class Final(Named):
    def __init__(self, width, out):
        linear, adaptation = nn.Linear(width, out), modulation(2, width)
        super().__init__(linear=linear, adaLN_modulation=adaptation)

    def forward(self, x, c):
        shift, scale = (m[:, None] for m in self.adaLN_modulation(c).chunk(2, dim=-1))
        return self.linear(normed(x) * (1 + scale) + shift)


class DiT(nn.Module):
    def __init__(
        self,
        input_size=32,
        patch_size=2,
        in_channels=4,
        hidden_size=1152,
        depth=28,
        num_heads=16,
        mlp_ratio=4.0,
        class_dropout_prob=0.1,
        num_classes=1000,
        learn_sigma=True,
    ):
        super().__init__()
        self.side, self.patch = input_size // patch_size, patch_size
        self.out = in_channels * (2 if learn_sigma else 1)
        table = torch.from_numpy(sincos_pos_embed_2d(self.side, hidden_size))[None]
        self.pos_embed = nn.Parameter(table, requires_grad=False)
        self.x_embedder = Patches(in_channels, hidden_size, patch_size)
        self.t_embedder = Times(hidden_size)
        self.y_embedder = Labels(num_classes + (class_dropout_prob > 0), hidden_size)
        hidden = int(hidden_size * mlp_ratio)
        self.blocks = nn.ModuleList(
            Block(hidden_size, num_heads, hidden) for _ in range(depth)
        )
        self.final_layer = Final(hidden_size, patch_size**2 * self.out)

    def forward(self, x, t, y):
        """x [N, C, H, W] -> [N, C or 2C, H, W]"""
        x = self.x_embedder(x) + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder(y)
        for block in self.blocks:
            x = block(x, c)
        x = self.final_layer(x, c)
        x = x.view(len(x), self.side, self.side, self.patch, self.patch, self.out)
        side = self.side * self.patch
        return x.permute(0, 5, 1, 3, 2, 4).reshape(len(x), self.out, side, side)

    def forward_with_cfg(self, x, t, y, cfg_scale):
        """Rows come twice, with labels and without: 3 channels are extrapolated."""
        out = self(torch.cat([x[: len(x) // 2]] * 2), t, y)
        with_label, without = out[:, :3].chunk(2)
        guided = without + cfg_scale * (with_label - without)
        return torch.cat([torch.cat([guided, guided]), out[:, 3:]], dim=1)


class SiT(DiT):
    def forward(self, x, t, y):
        return super().forward(x, t, y)[:, : x.shape[1]]
