"""Named configurations: the published ones (arXiv 2301.13622), few labels, two domains, and small digits.

Of the published ones the network, the path, the optimiser, batch and steps are those of the released command
lines. What is not theirs: labels are mixed where images are, nothing is mirrored that must not be, the head
has a LayerNorm, and validation images are never the test's.
"""

from __future__ import annotations

from typing import Any

from cdm_core.records import Recipe

# -- small images, trained here ------------------------------------------------------------------------------

_UNET: dict[str, Any] = {
    "name": "unet",
    "model_channels": 32,
    "channel_mult": [1, 2],
    "num_res_blocks": 1,
    "attention_resolutions": [2],
    "num_heads": 2,
    "dropout": 0.0,
    "head_dropout": 0.3,
    "beta_start": 1e-4,
}
# Digits are not mirrored, and of 8 pixels few can be cut off.
_WRITING: dict[str, Any] = {
    "crop": 0.5,
    "crop_area": [0.7, 1.0],
    "rotate": 0.5,
    "rotate_by": 15.0,
    "contrast": 0.25,
    "brightness": 0.25,
}
_DIGITS: dict[str, Any] = {
    "model": _UNET,
    "objective": {"name": "joint", "classify": "both", "w_ce": 0.05, "augmentation": _WRITING},
    "data": {"name": "core/digits"},
    "sampler": {"name": "core/ddpm", "variance": "large"},
    "adapter": {"name": "representations", "scale": 100.0},
    "train": {
        "steps": 2500,
        "batch_size": 64,
        "optimizer": "adamw",
        "lr": 1e-3,
        "betas": [0.9, 0.99],
        "lr_schedule": [{"kind": "warmup", "steps": 100}, {"kind": "cosine"}],
        "ema_decay": 0.995,
        "log_every": 100,
        "validate_every": 500,
        "checkpoint_every": 500,
    },
    "sample": {"steps": 50, "clip": True},
}
_MNIST: dict[str, Any] = {
    "base": "default",
    "model": {"channel_mult": [1, 2, 2], "attention_resolutions": [4]},
    "objective": {"augmentation": {"rotate": 0.5, "crop_area": [0.8, 1.0]}},
    "data": {"name": "core/mnist"},
    "train": {"steps": 6000},
}


def _few(of: str, labels: float, again: float, **settings: Any) -> dict[str, Any]:
    """Data of which a share has labels; every batch has about `again` of those for the head."""
    data = {"name": "partly-labelled", "of": of, "labels": labels, "again": again}
    return data | ({"settings": settings} if settings else {})


# -- published -----------------------------------------------------------------------------------------------

# The classifier's augmentation; of writing and of clothes nothing is mirrored.
_PUBLISHED: dict[str, Any] = {
    "jitter": 0.25,
    "crop": 0.25,
    "rotate": 0.25,
    "flip": 0.5,
    "contrast": 0.25,
    "sharpness": 0.25,
    "brightness": 0.25,
    "mixup": 0.5,
}
_CIFAR10: dict[str, Any] = {
    "model": {"name": "unet"},
    "objective": {"name": "joint", "classify": "clean", "w_ce": 0.001, "augmentation": _PUBLISHED},
    "data": {"name": "core/cifar10", "dequantise": False},
    "sampler": {"name": "core/ddpm", "variance": "large"},
    "adapter": {"name": "representations", "head_level": "clean", "scale": 100.0},
    "train": {
        "steps": 500_000,
        "batch_size": 256,
        "optimizer": "adamw",
        "lr": 1e-4,
        "ema_decay": 0.9999,
        "log_every": 100,
        "validate_every": 5000,
        "checkpoint_every": 5000,
        "sample_every": 25_000,
    },
    "sample": {"steps": 1000, "batch_size": 16},
}
_FASHION: dict[str, Any] = {
    "base": "cifar10",
    "model": {
        "model_channels": 64,
        "channel_mult": [1, 2, 2],
        "attention_resolutions": [1],
        "diffusion_steps": 500,
    },
    "data": {"name": "core/fashion-mnist", "dequantise": False},
    "train": {"steps": 100_000, "batch_size": 128},
    "sample": {"steps": 500},
}
_CELEBA: dict[str, Any] = {
    "base": "cifar10",
    "model": {
        "model_channels": 64,
        "channel_mult": [1, 2, 3, 4],
        "attention_resolutions": [4, 8],
        "multi_label": True,
    },
    "data": {"name": "celeba-attributes", "dequantise": False},
    "train": {"steps": 100_000, "batch_size": 128},
}

RECIPES = [
    Recipe("digits", "Digits 8x8: denoises and classifies, minutes on 2 cores", _DIGITS),
    Recipe("default", "What `train` runs unless told otherwise: digits", {"base": "digits"}),
    Recipe("mnist", "MNIST 28x28, the network of digits with a resolution more", _MNIST),
    Recipe("cifar10", "CIFAR-10, as published", _CIFAR10),
    Recipe(
        "cifar100",
        "CIFAR-100, as published",
        {"base": "cifar10", "data": {"name": "core/cifar100", "dequantise": False}},
    ),
    Recipe(
        "svhn",
        "SVHN, as published; nothing is mirrored",
        {
            "base": "cifar10",
            "objective": {"augmentation": {"flip": 0.0}},
            "data": {"name": "core/svhn", "dequantise": False},
            "train": {"steps": 250_000},
        },
    ),
    Recipe("fashion-mnist", "Fashion-MNIST, as published: 500 levels", _FASHION),
    Recipe("celeba", "CelebA 64x64, 40 attributes", _CELEBA),
    Recipe(
        "semi-supervised-digits",
        "Digits 8x8, one label in twenty",
        {"base": "digits", "data": _few("core/digits", 0.05, 0.25)},
    ),
    Recipe(
        "semi-supervised-mnist",
        "MNIST 28x28, one label in twenty",
        {"base": "mnist", "data": _few("core/mnist", 0.05, 0.25)},
    ),
    Recipe(
        "semi-supervised-svhn",
        "SVHN, one label in twenty",
        {"base": "svhn", "data": _few("core/svhn", 0.05, 0.25, dequantise=False)},
    ),
    Recipe(
        "semi-supervised-cifar10",
        "CIFAR-10, one label in ten",
        {"base": "cifar10", "data": _few("core/cifar10", 0.1, 0.25, dequantise=False)},
    ),
    Recipe(
        "svhn-to-mnist",
        "Labels of SVHN, images of MNIST: tested on MNIST",
        {
            "base": "svhn",
            "data": {
                "name": "domains",
                "source": "core/svhn",
                "source_settings": {"dequantise": False},
                "target": "core/mnist",
                "target_settings": {"dequantise": False},
            },
        },
    ),
]
