"""U-Net of improved diffusion (arXiv:2102.09672) and guided diffusion (arXiv:2105.05233)."""

import math

import torch
import torch.nn.functional as F
from torch import nn


def embed(t, width):
    """Cosines, then sines; 1/10000 would be the frequency after the last."""
    half = width // 2
    angles = t[:, None] * torch.exp(-math.log(10000) * torch.arange(half) / half)
    return torch.cat([angles.cos(), angles.sin()], 1)


def norm(width):
    return nn.GroupNorm(32, width, eps=1e-5)


def conv(narrow, wide):
    return nn.Conv2d(narrow, wide, 3, padding=1)


class ResBlock(nn.Module):
    """Residual block; with ``resize`` 2 or 1/2 both of its branches change the resolution."""

    def __init__(self, narrow, wide, time, *, scale_shift, resize=1):
        super().__init__()
        self.scale_shift, self.resize = scale_shift, resize
        self.in_layers = nn.Sequential(norm(narrow), nn.SiLU(), conv(narrow, wide))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(time, wide * (1 + scale_shift)))
        self.out_layers = nn.Sequential(norm(wide), nn.SiLU(), nn.Dropout(0), conv(wide, wide))
        self.skip_connection = nn.Identity() if narrow == wide else nn.Conv2d(narrow, wide, 1)

    def resized(self, x):
        if self.resize == 2:
            return F.interpolate(x, scale_factor=2.0)
        return F.avg_pool2d(x, 2) if self.resize == 0.5 else x

    def forward(self, x, time):
        h = self.in_layers[2](self.resized(F.silu(self.in_layers[0](x))))
        emb = self.emb_layers(time)[..., None, None]
        if self.scale_shift:
            scale, shift = emb.chunk(2, 1)
            h = self.out_layers[0](h) * (1 + scale) + shift
        else:
            h = self.out_layers[0](h + emb)
        return self.skip_connection(self.resized(x)) + self.out_layers[1:](h)


class Attention(nn.Module):
    """Each head reads its own q, k and v from consecutive channels."""

    def __init__(self, width, head_channels):
        super().__init__()
        self.norm, self.heads = norm(width), width // head_channels
        self.qkv, self.proj_out = nn.Conv1d(width, 3 * width, 1), nn.Conv1d(width, width, 1)

    def forward(self, x, time):
        flat = x.flatten(2)
        q, k, v = self.qkv(self.norm(flat)).unflatten(1, (self.heads, 3, -1)).unbind(2)
        scores = torch.einsum("bhci,bhcj->bhij", q, k) / math.sqrt(q.shape[2])
        mixed = torch.einsum("bhij,bhcj->bhci", scores.softmax(-1), v).flatten(1, 2)
        return (flat + self.proj_out(mixed)).view_as(x)


class Down(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.op = nn.Conv2d(width, width, 3, stride=2, padding=1)

    def forward(self, x, time):
        return self.op(x)


class Up(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv = conv(width, width)

    def forward(self, x, time):
        return self.conv(F.interpolate(x, scale_factor=2.0))


class ADMUNet(nn.Module):
    """Outputs (N, outputs, side, side) for ``x`` at timesteps ``t`` (N,); `attended` are levels."""

    def __init__(
        self,
        *,
        channels=3,
        outputs=6,
        ch=128,
        mult=(1, 1, 2, 2, 4, 4),
        blocks=1,
        attended=(4,),
        head_channels=64,
        scale_shift=True,
        residual=True,
    ):
        super().__init__()
        self.ch, time, widths = ch, 4 * ch, [ch * m for m in mult]

        def block(narrow, wide, resize=1):
            return ResBlock(narrow, wide, time, scale_shift=scale_shift, resize=resize)

        self.time_embed = nn.Sequential(nn.Linear(ch, time), nn.SiLU(), nn.Linear(time, time))
        self.input_blocks = nn.ModuleList([nn.ModuleList([conv(channels, ch)])])
        kept, width = [ch], ch
        for level, wide in enumerate(widths):
            for _ in range(blocks):
                attention = [Attention(wide, head_channels)] if level in attended else []
                self.input_blocks.append(nn.ModuleList([block(width, wide), *attention]))
                kept.append(width := wide)
            if level < len(widths) - 1:
                self.input_blocks.append(
                    nn.ModuleList([block(width, width, 0.5) if residual else Down(width)])
                )
                kept.append(width)
        middle = [block(width, width), Attention(width, head_channels), block(width, width)]
        self.middle_block, self.output_blocks = nn.ModuleList(middle), nn.ModuleList()
        for level, wide in reversed(list(enumerate(widths))):
            for i in range(blocks + 1):
                layers = [block(width + kept.pop(), wide)]
                layers += [Attention(wide, head_channels)] if level in attended else []
                if level and i == blocks:
                    layers.append(block(wide, wide, 2) if residual else Up(wide))
                self.output_blocks.append(nn.ModuleList(layers))
                width = wide
        self.out = nn.Sequential(norm(width), nn.SiLU(), conv(width, outputs))

    def forward(self, x, t):
        time = self.time_embed(embed(t, self.ch))
        kept = [self.input_blocks[0][0](x)]
        for layers in self.input_blocks[1:]:
            kept.append(run(layers, kept[-1], time))
        h = run(self.middle_block, kept[-1], time)
        for layers in self.output_blocks:
            h = run(layers, torch.cat([h, kept.pop()], 1), time)
        return self.out(h)


def run(layers, x, time):
    for layer in layers:
        x = layer(x, time)
    return x
