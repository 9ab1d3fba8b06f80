"""U-Net of DDPM (Ho et al., arXiv:2006.11239) in the layout of its PyTorch port."""

import math

import torch
import torch.nn.functional as F
from torch import nn


def embed(t, width):
    """Sines, then cosines; the last frequency is exactly 1/10000."""
    half = width // 2
    angles = t[:, None] * torch.exp(-math.log(10000) * torch.arange(half) / (half - 1))
    return torch.cat([angles.sin(), angles.cos()], 1)


def norm(width):
    return nn.GroupNorm(32, width, eps=1e-6)


class Block(nn.Module):
    def __init__(self, narrow, wide, time):
        super().__init__()
        self.norm1, self.conv1 = norm(narrow), nn.Conv2d(narrow, wide, 3, padding=1)
        self.temb_proj = nn.Linear(time, wide)
        self.norm2, self.conv2 = norm(wide), nn.Conv2d(wide, wide, 3, padding=1)
        if narrow != wide:
            self.nin_shortcut = nn.Conv2d(narrow, wide, 1)

    def forward(self, x, time):
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.temb_proj(F.silu(time))[..., None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class Attention(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = norm(width)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2) for layer in (self.q, self.k, self.v))
        scores = torch.einsum("bci,bcj->bij", q, k) / math.sqrt(q.shape[1])
        mixed = torch.einsum("bij,bcj->bci", scores.softmax(-1), v)
        return x + self.proj_out(mixed.view_as(x))


class Resample(nn.Module):
    def __init__(self, width, *, up):
        super().__init__()
        self.up = up
        self.conv = nn.Conv2d(width, width, 3, stride=1 if up else 2, padding=1 if up else 0)

    def forward(self, x):
        """Padding is right and below only on the way down."""
        return self.conv(F.interpolate(x, scale_factor=2.0) if self.up else F.pad(x, (0, 1, 0, 1)))


class Level(nn.Module):
    def __init__(self, widths_in, width, time, attended):
        super().__init__()
        self.block = nn.ModuleList(Block(narrow, width, time) for narrow in widths_in)
        self.attn = nn.ModuleList(Attention(width) for _ in widths_in if attended)

    def step(self, i, x, time):
        x = self.block[i](x, time)
        return self.attn[i](x) if self.attn else x


class DDPMUNet(nn.Module):
    """Noise in ``x`` (N, channels, side, side) at timesteps ``t`` (N,); `attended` are levels."""

    def __init__(
        self, *, channels=3, outputs=3, ch=128, mult=(1, 1, 2, 2, 4, 4), blocks=2, attended=(4,)
    ):
        super().__init__()
        self.ch, time, widths = ch, 4 * ch, [ch * m for m in mult]
        self.temb = nn.Module()
        self.temb.dense = nn.ModuleList([nn.Linear(ch, time), nn.Linear(time, time)])
        self.conv_in = nn.Conv2d(channels, ch, 3, padding=1)
        self.down, self.up, self.mid = nn.ModuleList(), nn.ModuleList(), nn.Module()
        for i, (before, width) in enumerate(zip([ch, *widths], widths, strict=False)):
            deeper = widths[min(i + 1, len(widths) - 1)]
            skips = [width] * blocks + [before]
            hidden = [deeper] + [width] * blocks
            down = Level([before] + [width] * (blocks - 1), width, time, i in attended)
            up = Level(
                [a + b for a, b in zip(hidden, skips, strict=True)], width, time, i in attended
            )
            if i < len(widths) - 1:
                down.downsample = Resample(width, up=False)
            if i > 0:
                up.upsample = Resample(width, up=True)
            self.down.append(down)
            self.up.append(up)
        self.mid.block_1, self.mid.block_2 = Block(width, width, time), Block(width, width, time)
        self.mid.attn_1 = Attention(width)
        self.norm_out, self.conv_out = (
            norm(ch * mult[0]),
            nn.Conv2d(ch * mult[0], outputs, 3, padding=1),
        )

    def forward(self, x, t):
        first, second = self.temb.dense
        time = second(F.silu(first(embed(t, self.ch))))
        skips = [self.conv_in(x)]
        for level in self.down:
            for i in range(len(level.block)):
                skips.append(level.step(i, skips[-1], time))
            if hasattr(level, "downsample"):
                skips.append(level.downsample(skips[-1]))
        h = self.mid.attn_1(self.mid.block_1(skips[-1], time))
        h = self.mid.block_2(h, time)
        for level in reversed(self.up):
            for i in range(len(level.block)):
                h = level.step(i, torch.cat([h, skips.pop()], 1), time)
            h = level.upsample(h) if hasattr(level, "upsample") else h
        return self.conv_out(F.silu(self.norm_out(h)))
