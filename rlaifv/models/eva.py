"""The image tower of OmniLMM: EVA02-CLIP-E/14 without its last block, as timm names its weights.

A vision transformer whose blocks normalise what they add, with biases on queries and values only
and a table of positions that is stretched to the image (arXiv 2303.15389; timm's
`eva02_enormous_patch14_clip_224`, with which keys and outputs are compared in the tests).

Shapes:  I images;  T tokens, class token first;  W width;  H heads;  D width of a head.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

EPSILON = 1e-6


class TowerShape(NamedTuple):
    """Sizes; the defaults are EVA02-CLIP-E/14's."""

    width: int = 1792
    blocks: int = 63
    """Of 64: the last one is not used."""
    heads: int = 16
    mlp: int = 15360
    patch: int = 14
    table: int = 16
    """Rows and columns of the position table: 224 / 14."""


class Attention(nn.Module):
    """Self-attention; keys have no bias."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.proj = nn.Linear(width, width)

    def forward(self, x_ITW: Tensor) -> Tensor:
        images, tokens, width = x_ITW.shape
        bias_3W = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = F.linear(x_ITW, self.qkv.weight, bias_3W)
        qkv_3IHTD = qkv.view(images, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        query, key, value = qkv_3IHTD.unbind(0)
        out_IHTD = F.scaled_dot_product_attention(query, key, value)
        projected: Tensor = self.proj(out_IHTD.transpose(1, 2).reshape(images, tokens, width))
        return projected


class Mlp(nn.Module):
    """Two layers with GELU between."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x_ITW: Tensor) -> Tensor:
        out_ITW: Tensor = self.fc2(F.gelu(self.fc1(x_ITW)))
        return out_ITW


class EvaBlock(nn.Module):
    """Normalises the outputs of attention and MLP, not their inputs."""

    def __init__(self, shape: TowerShape) -> None:
        super().__init__()
        self.attn = Attention(shape.width, shape.heads)
        self.norm1 = nn.LayerNorm(shape.width, eps=EPSILON)
        self.mlp = Mlp(shape.width, shape.mlp)
        self.norm2 = nn.LayerNorm(shape.width, eps=EPSILON)

    def forward(self, x_ITW: Tensor) -> Tensor:
        x_ITW = x_ITW + self.norm1(self.attn(x_ITW))
        out_ITW: Tensor = x_ITW + self.norm2(self.mlp(x_ITW))
        return out_ITW


class PatchEmbed(nn.Module):
    """Patches to tokens; images are filled up with zeros on the right and below."""

    def __init__(self, shape: TowerShape) -> None:
        super().__init__()
        self.patch = shape.patch
        self.proj = nn.Conv2d(3, shape.width, kernel_size=shape.patch, stride=shape.patch)

    def forward(self, pixels: Tensor) -> Tensor:
        """[I, W, rows, columns]."""
        height, width = pixels.shape[-2:]
        pixels = F.pad(pixels, (0, -width % self.patch, 0, -height % self.patch))
        patches: Tensor = self.proj(pixels)
        return patches


class EvaTower(nn.Module):
    """Pixels [I, 3, height, width] to features of the patches [I, rows * columns, W]."""

    def __init__(self, shape: TowerShape) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, shape.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + shape.table**2, shape.width))
        self.patch_embed = PatchEmbed(shape)
        self.blocks = nn.ModuleList(EvaBlock(shape) for _ in range(shape.blocks))
        self.norm = nn.LayerNorm(shape.width, eps=EPSILON)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.patch_embed(pixels.to(self.cls_token.dtype))
        rows, columns = patches.shape[-2:]
        class_token = self.cls_token.expand(len(patches), -1, -1)
        x_ITW = torch.cat([class_token, patches.flatten(2).transpose(1, 2)], 1)
        table_W = self.pos_embed[0]
        positions = torch.cat([table_W[:1], stretch(table_W[1:], rows, columns, antialias=True)])
        x_ITW = x_ITW + positions
        for block in self.blocks:
            x_ITW = block(x_ITW)
        features: Tensor = self.norm(x_ITW)[:, 1:]
        return features


def stretch(table: Tensor, rows: int, columns: int, *, antialias: bool) -> Tensor:
    """A square table of positions [n * n, W] for another grid, [rows * columns, W]; bicubic."""
    side = round(len(table) ** 0.5)
    if (rows, columns) == (side, side):
        return table
    grid = table.float().view(1, side, side, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(
        grid, size=(rows, columns), mode="bicubic", align_corners=False, antialias=antialias
    )
    return grid.permute(0, 2, 3, 1).reshape(rows * columns, -1).to(table.dtype)
