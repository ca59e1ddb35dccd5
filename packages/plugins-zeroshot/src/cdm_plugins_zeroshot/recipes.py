"""Named configurations."""

from __future__ import annotations

from typing import Any

from cdm_core.records import Recipe

# The published training of the context U-Net: Adam, lr 1e-4 falling to 0 (there by epochs in a straight line,
# here in a cosine), no EMA, as its batch norms have running averages of their own, one label in ten dropped.
_MNIST: dict[str, Any] = {
    "model": {"name": "context-unet", "n_feat": 256},
    "objective": {"name": "core/denoising", "label_dropout": 0.1},
    "data": {"name": "core/mnist"},
    "sampler": {"name": "core/ddpm", "variance": "large"},
    "train": {
        "steps": 5860,  # 50 epochs of 60,000 images
        "batch_size": 512,
        "lr": 1e-4,
        "lr_schedule": [{"kind": "cosine"}],
        "ema_decay": 0.0,
        "log_every": 100,
        "validate_every": 500,
        "checkpoint_every": 500,
    },
    "sample": {"steps": 400, "guidance": 0.5},
}
_DIGITS: dict[str, Any] = {
    "base": "mnist",
    "model": {"n_feat": 32},
    "data": {"name": "core/digits"},
    "train": {"steps": 3000, "batch_size": 64, "lr": 1e-3},
}

RECIPES = [
    Recipe("default", "Digits 8x8: a context U-Net, minutes on 2 cores", _DIGITS),
    Recipe("mnist", "MNIST 28x28: the published context U-Net", _MNIST),
]
