"""Named configurations: what can be trained here in minutes, and what was published, with its settings."""

from __future__ import annotations

from typing import Any

from cdm_core.records import Recipe
from cdm_plugins_guidance.adm_configs import PUBLISHED_UNETS

# -- small images, trained here ------------------------------------------------------------------------------
# Of each data set: the pair that is guided; a classifier of another shape and seed that judges it, and has no
# other part in it; and the same denoiser told the classes, for what guidance is measured against.

_SMALL: dict[str, Any] = {
    "model_channels": 32,
    "channel_mult": [1, 2],
    "num_res_blocks": 1,
    "attention_resolutions": [2],
    "num_heads": 2,
    "num_head_channels": -1,
    "resblock_updown": False,
    "noise_schedule": "linear",
    "dropout": 0.0,
}
_MNIST_UNET: dict[str, Any] = {**_SMALL, "channel_mult": [1, 2, 2], "attention_resolutions": [4]}
_TRAIN: dict[str, Any] = {
    "steps": 4000,
    "batch_size": 64,
    "lr": 1e-3,
    "betas": [0.9, 0.99],
    "lr_schedule": [{"kind": "warmup", "steps": 100}, {"kind": "cosine"}],
    "ema_decay": 0.995,
    "log_every": 100,
    "validate_every": 500,
    "checkpoint_every": 500,
}
# Of the settings tried on digits, against training images, the ones of least Frechet distance: a milder
# Jacobian, and a classifier averaged over small shifts, keep the variety that the published step narrows.
_GUIDE: dict[str, Any] = {
    "name": "guide",
    "scale": 1.4,
    "jacobian": "gaussian",
    "guide": {"tau2": 0.8, "copies": 4, "shift": 1},
}
_DIGITS: dict[str, Any] = {
    "model": {"name": "pair", "denoiser": _SMALL},
    "objective": {"name": "pair"},
    "data": {"name": "core/digits"},
    "sampler": {"name": "core/ddpm", "variance": "large"},
    "adapter": _GUIDE,
    "train": _TRAIN,
    "sample": {"steps": 50, "clip": True},
}
_DIGITS_JUDGE: dict[str, Any] = {
    "seed": 1,
    "model": {"name": "classifier", "widths": [48, 96], "blocks": 2},
    "objective": {"name": "classification", "smoothing": 0.1},
    "data": {"name": "core/digits"},
    "sampler": {"name": "core/ddpm"},
    "train": {**_TRAIN, "steps": 1500},
}
_DIGITS_COND: dict[str, Any] = {
    "model": {"name": "adm", **_SMALL, "class_cond": True, "null_class": True},
    "objective": {"name": "core/denoising"},
    "data": {"name": "core/digits"},
    "sampler": {"name": "core/ddpm"},
    "train": _TRAIN,
    "sample": {"steps": 50, "clip": True},
}
_MNIST: dict[str, Any] = {
    "base": "default",
    "model": {"denoiser": _MNIST_UNET},
    "data": {"name": "core/mnist"},
    "adapter": {"scale": 30.0},  # of the few tried on MNIST the one of least distance
    "train": {"steps": 2500},
}
_MNIST_JUDGE: dict[str, Any] = {
    "base": "digits-judge",
    "model": {"widths": [32, 64, 96]},
    "data": {"name": "core/mnist"},
}
_MNIST_COND: dict[str, Any] = {
    "base": "digits-conditional",
    "model": _MNIST_UNET,
    "data": {"name": "core/mnist"},
    "train": {"steps": 2500},
}


# -- published settings --------------------------------------------------------------------------------------
# Of the released denoisers: to sample their converted weights (`sample FILE --recipe NAME`), and to train
# their like; `--set data.root=...` names a folder of images, a subfolder a class.


def _imagenet(size: int) -> dict[str, Any]:
    return {"name": "core/image-folder", "root": "imagenet/train", "size": size, "flip": True}


def _classifier(depth: int) -> dict[str, Any]:
    return {"name": f"torchvision:resnet{depth}", "weights": "IMAGENET1K_V2"}


def _adm128(depth: int) -> dict[str, Any]:
    size, settings = PUBLISHED_UNETS["128x128_diffusion"]
    return {
        "model": {"name": "adm", **settings},
        "objective": {"name": "core/denoising"},
        "data": _imagenet(size),
        "sampler": {"name": "core/ddpm"},
        "adapter": {"name": "elucd", "scale": 1.0, "classifier": {**_classifier(depth), "softplus": 3.0}},
        "train": {"steps": 4_360_000, "batch_size": 256, "lr": 1e-4, "optimizer": "adamw"},
        "sample": {"steps": 250, "clip": True, "batch_size": 16},
    }


_EDM64: dict[str, Any] = {
    "model": {"name": "edm", "conditional": True},
    "objective": {"name": "edm", "label_dropout": 0.0},
    "data": _imagenet(64),
    "sampler": {"name": "core/heun"},
    "adapter": {
        "name": "elucd-edm",
        "scale": 0.004,
        "classifier": {**_classifier(101), "softplus": 5.0},
        "guide": {"tau2": 0.0},
    },
    "train": {"steps": 610_000, "batch_size": 4096, "lr": 1e-4, "ema_decay": 0.99993},
    "sample": {"steps": 18, "grid": "rho"},
}


def _dit(size: int) -> dict[str, Any]:
    """Not published but for the figure: the step of EluCD on decoded predictions, after the CFG of DiT.

    To sample converted weights with; trained on latents, which is not offered, it cannot be here.
    """
    return {
        "model": {"name": "dit", "autoencoder": "sd-vae-ft-mse"},
        "objective": {"name": "core/denoising", "label_dropout": 0.1},
        "data": _imagenet(size // 8),
        "sampler": {"name": "core/ddpm"},
        "adapter": {
            "name": "elucd",
            "scale": 1.0,
            "classifier": {**_classifier(101), "softplus": 3.0},
            "guide": {"discount": 0.5, "micro_batch": 4},
        },
        "train": {"steps": 7_000_000, "batch_size": 256, "lr": 1e-4, "optimizer": "adamw"},
        "sample": {"steps": 250, "guidance": 0.5, "batch_size": 8},
    }


RECIPES = [
    Recipe("default", "Digits 8x8: a denoiser and a classifier, minutes on 2 cores", _DIGITS),
    Recipe("digits-judge", "Digits 8x8: the classifier that judges", _DIGITS_JUDGE),
    Recipe("digits-conditional", "Digits 8x8: the denoiser, told the class", _DIGITS_COND),
    Recipe("mnist", "MNIST 28x28: a denoiser and a classifier, half an hour on 2 cores", _MNIST),
    Recipe("mnist-judge", "MNIST 28x28: the classifier that judges", _MNIST_JUDGE),
    Recipe("mnist-conditional", "MNIST 28x28: the denoiser, told the class", _MNIST_COND),
    Recipe("adm128-resnet50", "ADM at 128x128 under a ResNet-50 (EluCD: FID 2.36)", _adm128(50)),
    Recipe("adm128-resnet101", "ADM at 128x128 under a ResNet-101 (EluCD: FID 2.19)", _adm128(101)),
    Recipe("edm64-resnet101", "EDM at 64x64 under a ResNet-101 (EluCD: FID 2.35)", _EDM64),
    Recipe("dit256", "DiT-XL/2 at 256x256, a classifier on what it decodes", _dit(256)),
    Recipe("dit512", "DiT-XL/2 at 512x512, a classifier on what it decodes", _dit(512)),
]
