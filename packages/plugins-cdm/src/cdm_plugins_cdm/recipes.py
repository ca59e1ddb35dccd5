"""Named configurations. Those of CIFAR-10 and CelebA have the paper's hyper-parameters (arXiv 2402.10095, B).

One thing differs from the paper: the images are dequantised, in training and in evaluation. Without it,
likelihoods of 8-bit images mean nothing: a density can be as high as it likes on the lattice of grey levels.
"""

from __future__ import annotations

from typing import Any

from cdm_core.records import Recipe

# The encoder alone: per second of training it beats the whole U-Net here, and what it claims of the
# likelihood agrees with what its sampler guarantees (the package's README has the figures).
_DIGITS: dict[str, Any] = {
    "model": {
        "name": "unet",
        "channels": 32,
        "ch_mult": [1, 2, 2],
        "num_res_blocks": 1,
        "attn_resolutions": [4],
        "norm_groups": 8,
        "decoder": False,
        "path": "uniform",
    },
    "objective": {"name": "cdm"},
    "data": {"name": "core/digits"},
    "sampler": {"name": "core/ddim"},
    "train": {
        "steps": 6000,
        "batch_size": 64,
        "lr": 2e-3,
        "betas": [0.9, 0.99],
        "lr_schedule": [{"kind": "warmup", "steps": 100}, {"kind": "cosine"}],
        "ema_decay": 0.99,
        "log_every": 100,
        "validate_every": 400,
        "checkpoint_every": 400,
    },
    "sample": {"steps": 50},
}

_MIXTURE: dict[str, Any] = {
    "model": {"name": "mlp", "path": "uniform", "noise_steps": 60},
    "objective": {"name": "cdm", "w_ce": 0.1},
    "data": {"name": "core/gaussian-mixture"},
    "sampler": {"name": "core/dpm-solver++"},
    "train": {
        "steps": 3000,
        "batch_size": 512,
        "lr": 3e-3,
        "lr_schedule": [{"kind": "warmup", "steps": 100}, {"kind": "cosine"}],
        "ema_decay": 0.999,
        "validate_every": 1000,
        "checkpoint_every": 1000,
    },
    "sample": {"steps": 50, "batch_size": 2000},
}

_CIFAR10: dict[str, Any] = {
    "model": {"name": "unet"},
    "objective": {"name": "cdm"},
    "data": {"name": "core/cifar10", "flip": True},
    "sampler": {"name": "core/ddim"},
    "train": {
        "steps": 500_000,
        "batch_size": 128,
        "lr": 2e-4,
        "lr_schedule": [
            {"kind": "warmup", "steps": 5000},
            {"kind": "step", "steps": 200_000, "factor": 0.1},
        ],
        "ema_decay": 0.9999,
        "ema_start": 5000,
        "log_every": 100,
        "validate_every": 5000,
        "checkpoint_every": 5000,
        "sample_every": 25_000,
    },
    "sample": {"steps": 50},
}

RECIPES = [
    Recipe("digits", "8x8 digits on a laptop: minutes on 2 cores", _DIGITS),
    Recipe("default", "What `train` runs unless told otherwise: digits", {"base": "digits"}),
    Recipe(
        "digits-cond",
        "The same with classes: guidance, and classification by Bayes' rule",
        {"base": "digits", "model": {"conditional": True}},
    ),
    Recipe(
        "digits-bayes",
        "8x8 digits with classes and fewer levels: classification by Bayes' rule in one pass a class",
        {
            "base": "digits",
            "model": {"conditional": True, "decoder": True, "noise_steps": 200},
            "train": {"steps": 2500},
        },
    ),
    Recipe("mixture-2d", "A ring of Gaussians in the plane, whose truth is known", _MIXTURE),
    Recipe("cifar10", "CIFAR-10, DDPM path", _CIFAR10),
    Recipe(
        "cifar10-cond",
        "CIFAR-10 with classes, one label in ten dropped",
        {
            "base": "cifar10",
            "model": {"conditional": True},
            "objective": {"label_dropout": 0.1},
            "sample": {"guidance": 0.5},
        },
    ),
    Recipe(
        "cifar10-uniform",
        "CIFAR-10, sigma_t = t / (T + 1)",
        {"base": "cifar10", "model": {"path": "uniform"}, "train": {"lr": 1e-4}},
    ),
    Recipe(
        "cifar10-ot",
        "CIFAR-10, the straight path, constant learning rate",
        {
            "base": "cifar10",
            "model": {"path": "ot"},
            "sampler": {"name": "core/euler"},
            "train": {"steps": 1_000_000, "lr": 1e-4, "lr_schedule": []},
            "sample": {"steps": 999},
        },
    ),
    Recipe(
        "celeba64",
        "CelebA 64x64, DDPM path",
        {
            "base": "cifar10",
            "model": {"ch_mult": [1, 2, 2, 2, 4]},
            "data": {"name": "core/celeba", "flip": True},
            "train": {"lr": 1e-4},
        },
    ),
]
