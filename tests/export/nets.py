"""Tiny networks, one per family of operators: `nets:cnn` and so on, each made anew with the same weights."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

SIZE, CLASSES = 32, 10


class Cnn(nn.Module):
    """Convolution, batch norm, a depthwise convolution, a residual, pooling, a linear layer: logits of 10 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.c1 = nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False)
        self.b1 = nn.BatchNorm2d(16)
        self.dw = nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False)
        self.b2 = nn.BatchNorm2d(16)
        self.pw = nn.Conv2d(16, 16, 1)
        self.fc = nn.Linear(16, CLASSES)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = F.relu6(self.b1(self.c1(image)))
        x = x + F.relu6(self.b2(self.dw(x)))
        x = F.hardswish(self.pw(x))
        return self.fc(x.mean((2, 3)))


class Normalised(nn.Module):
    """A network that takes images of 0 to 1 and normalises them itself, as files with their preprocessing inside do."""

    def __init__(self, net: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.net = net
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("std", torch.tensor(std)[:, None, None])

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.net((image - self.mean) / self.std)


class Swapped(nn.Module):
    """Blue where red should be."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.net(image.flip(1))


class Encoder(nn.Module):
    """One transformer layer over token ids, with a mask, pooled and normalised: an embedding. With `times`, the same
    layer so often, as ALBERT has it."""

    def __init__(self, times: int = 1, vocab: int = 100, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.times = heads, times
        self.table = nn.Embedding(vocab, width)
        self.places = nn.Embedding(64, width)
        self.norm, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        batch, length = input_ids.shape
        x = self.table(input_ids) + self.places(torch.arange(length))
        bias = (1.0 - attention_mask[:, None, None, :].float()) * -1e4
        for _ in range(self.times):
            x = self.norm(x)
            q, k, v = (t.view(batch, length, self.heads, -1).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
            seen = F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).reshape(batch, length, -1)
            x = self.norm2(x + self.out(seen))
            x = x + self.down(F.gelu(self.up(x)))
        weight = attention_mask[..., None].float()
        return F.normalize((x * weight).sum(1) / weight.sum(1), dim=-1)


class Touchy(nn.Module):
    """One of its products turns into an angle, and what rounding takes from that changes everything; the others do
    not."""

    def __init__(self) -> None:
        super().__init__()
        self.plain, self.angle, self.last = nn.Linear(24, 64), nn.Linear(24, 64), nn.Linear(128, CLASSES)
        nn.init.uniform_(self.angle.weight, -16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.cat([F.silu(self.plain(x)), torch.sin(self.angle(x))], -1))


class Mlp(nn.Module):
    """Linear layers alone."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(24, 64), nn.Linear(64, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(F.silu(self.a(x)))


class Convs(nn.Module):
    """What vision networks do besides: transposed and dilated convolutions, pools, padding, joining, upsampling."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 8, 3, padding=2, dilation=2)
        self.up = nn.ConvTranspose2d(8, 8, 2, stride=2)
        self.last = nn.Conv2d(16, CLASSES, 1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.down(image))
        small = self.up(F.max_pool2d(x, 2))
        wide = F.interpolate(F.avg_pool2d(x, 2), scale_factor=2, mode="nearest")
        both = torch.cat([small, F.pad(wide, (1, 0, 0, 0))[..., :-1]], 1)
        return torch.amax(F.leaky_relu(self.last(both), 0.1), (2, 3))


class Overflowing(nn.Module):
    """Whose middle exceeds what half precision can hold (65504), and whose end does not."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(24, 32), nn.Linear(32, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = F.relu(self.a(x)) * 300.0
        return self.b(torch.sqrt(wide * wide + 1.0) / 300.0)  # no compiler folds the square away


class Eigen(nn.Module):
    """With an operator that no target has."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.linalg.eigvals(x).abs()


class Deciding(nn.Module):
    """Whose way depends on its input's values."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1 if x.sum() > 0 else x - 1


def _made(kind: type[nn.Module], *given: object) -> nn.Module:
    torch.manual_seed(3)
    net = kind(*given)
    for part in net.modules():
        if isinstance(part, nn.BatchNorm2d):  # as after training: nothing is the identity
            nn.init.normal_(part.running_mean, std=0.3)
            nn.init.uniform_(part.running_var, 0.5, 2)
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.normal_(part.bias, std=0.3)
    return net.eval()


def cnn() -> nn.Module:
    return _made(Cnn)


def normalised() -> nn.Module:
    return Normalised(cnn(), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)).eval()


def wrong_mean() -> nn.Module:
    return Normalised(cnn(), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)).eval()


def swapped() -> nn.Module:
    return Swapped(normalised()).eval()


def encoder() -> nn.Module:
    return _made(Encoder)


def spiky(times: int = 1) -> nn.Module:
    """An encoder in which two channels are forty times as large as the others, and the matrices behind them take that
    back: as large ones are after training."""
    net = _made(Encoder, times)
    with torch.no_grad():
        for norm, product in ((net.norm, net.qkv), (net.norm2, net.up)):
            for channel in (3, 17):
                norm.weight[channel] *= 40
                product.weight[:, channel] /= 40
    return net


def repeated() -> nn.Module:
    return spiky(times=2)


def touchy() -> nn.Module:
    return _made(Touchy)


def mlp() -> nn.Module:
    return _made(Mlp)


def convs() -> nn.Module:
    return _made(Convs)


def overflowing() -> nn.Module:
    return _made(Overflowing)


def eigen() -> nn.Module:
    return Eigen()


def deciding() -> nn.Module:
    return Deciding()
