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


# -- published classifiers of others' denoisers --------------------------------------------------------------
# Of converted weights (`zeroshot classify FILE --recipe NAME`, whose `adapter` says how), and to train their
# like. Any `--method` may replace the published elimination, at a fraction of its cost.

# A class-conditional EDM (Karras et al. 2022, table 7, but for augmentations that leave no trace: flips are
# all) at 126 levels evenly from 1e-4 to 3 (Chen et al. 2024, arXiv 2305.15241), every class at each of them.
_CIFAR10: dict[str, Any] = {
    "model": {
        "name": "guidance/edm",
        "model_type": "SongUNet",
        "conditional": True,
        "model_channels": 128,
        "channel_mult": [2, 2, 2],
        "num_blocks": 4,
        "attn_resolutions": [16],
        "dropout": 0.13,
    },
    "objective": {"name": "guidance/edm", "label_dropout": 0.0},
    "data": {"name": "core/cifar10", "flip": True},
    "sampler": {"name": "core/heun"},
    "adapter": {
        "name": "zeroshot/classifier",
        "estimator": {
            "pairs": 126,
            "levels": 126,
            "sigma_min": 1e-4,
            "sigma_max": 3.0,
            "spacing": "linear",
            "design": "grid",
            "weight": "simple",
            "importance": "uniform",
        },
        "elimination": {"rule": "none"},
    },
    "train": {
        "steps": 390_625,  # 200 million images
        "batch_size": 512,
        "lr": 1e-3,
        "lr_schedule": [{"kind": "warmup", "steps": 19_531}],  # 10 million images
        "ema_decay": 0.99929,  # half in half a million images
        "validate_every": 5000,
        "checkpoint_every": 5000,
    },
    "sample": {"steps": 18, "grid": "rho"},
}
# Li et al. 2023, section 5.4: t = 2, 6, ..., 998 for each of a thousand classes. Trained on latents, which is
# not offered, it cannot be here.
_IMAGENET_DIT: dict[str, Any] = {
    "model": {"name": "guidance/dit", "autoencoder": "sd-vae-ft-mse"},
    "objective": {"name": "core/denoising", "label_dropout": 0.1},
    "data": {"name": "core/image-folder", "root": "imagenet/train", "size": 32},
    "sampler": {"name": "core/ddpm"},
    "adapter": {
        "name": "zeroshot/classifier",
        "estimator": {"pairs": 250, "design": "grid", "weight": "simple", "importance": "uniform"},
        "elimination": {"rule": "none"},
    },
    "train": {"steps": 7_000_000, "batch_size": 256, "lr": 1e-4, "optimizer": "adamw"},
    "sample": {"steps": 250, "guidance": 0.5, "batch_size": 8},
}
# Their command for CIFAR-10: one noise a level, in half precision, five classes kept after 50 of 500 levels.
# `--stages imagenet --set estimator.loss=l2` is theirs for ImageNet; OFFICIAL_STAGES has the others.
_STAGES: dict[str, Any] = {"stage_pairs": [50, 500], "stage_keep": [5, 1]}
_STABLE_DIFFUSION: dict[str, Any] = {
    "model": {"name": "stable-diffusion"},
    "objective": {"name": "core/denoising", "label_dropout": 0.1},
    "data": {"name": "core/image-folder", "root": "images/train", "size": 64},
    "sampler": {"name": "core/ddim"},
    "adapter": {
        "name": "zeroshot/classifier",
        "estimator": {
            "pairs": 500,
            "design": "grid",
            "loss": "l1",
            "weight": "simple",
            "importance": "uniform",
            "precision": "fp16",
        },
        "elimination": {"rule": "stages", **_STAGES},
    },
    "train": {"steps": 850_000, "batch_size": 2048, "lr": 1e-4, "optimizer": "adamw"},
    "sample": {"steps": 50, "guidance": 6.5, "batch_size": 4},
}

RECIPES = [
    Recipe("default", "Digits 8x8: a context U-Net, minutes on 2 cores", _DIGITS),
    Recipe("mnist", "MNIST 28x28: the published context U-Net", _MNIST),
    Recipe("cifar10", "CIFAR-10: an EDM (of plugin guidance), 126 levels a class", _CIFAR10),
    Recipe("imagenet-dit", "ImageNet: DiT-XL/2 (of plugin guidance), 250 levels a class", _IMAGENET_DIT),
    Recipe("stable-diffusion", "Stable Diffusion, prompts for classes, in two stages", _STABLE_DIFFUSION),
]
