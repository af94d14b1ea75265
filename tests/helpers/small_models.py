"""Small encoders and decoders, pictures with something to predict, and how fast a model learns them."""

from typing import Any

import torch

from coma.config import DecoderConfig, DyViTConfig, ViTConfig

DECODER = DecoderConfig(dim=32, depth=1, heads=2)
ENCODERS = {
    "dyvit": DyViTConfig(
        patch=1, dim=16, depths=(1, 1, 1, 1), heads=(2, 2, 4, 4), windows=((4, 8), (2, 4), (2, 0), (0,))
    ),
    "vit": ViTConfig(patch=8, dim=32, depth=2, heads=2),
}


def pictures(count=4, size=32):
    """Smooth coloured gradients with noise: something to predict."""
    torch.manual_seed(3)
    ramp = torch.linspace(-1, 1, size)
    slopes = torch.randn(count, 3, 2, 1, 1)
    return slopes[:, :, 0] * ramp + slopes[:, :, 1] * ramp[:, None] + 0.05 * torch.randn(count, 3, size, size)


def loss_curve(model: Any, images: torch.Tensor, steps: int) -> list[float]:
    """The loss of every step on the same images."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    seeds, curve = torch.arange(len(images)), []
    for step in range(steps):
        model.before_step(step / steps)
        loss = model(images, seeds + len(images) * step).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.after_step(step / steps)
        curve.append(loss.item())
    return curve
