"""Named configurations: what can be trained here in minutes, and what was published, with its settings."""

from __future__ import annotations

from typing import Any

from cdm_core.records import Recipe

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
_DIGITS: dict[str, Any] = {
    "model": {"name": "pair", "denoiser": _SMALL},
    "objective": {"name": "pair"},
    "data": {"name": "core/digits"},
    "sampler": {"name": "core/ddpm"},
    "adapter": {"name": "elucd"},
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
}

RECIPES = [
    Recipe("default", "Digits 8x8: a denoiser and a classifier, minutes on 2 cores", _DIGITS),
    Recipe("digits-judge", "Digits 8x8: the classifier that judges", _DIGITS_JUDGE),
    Recipe("digits-conditional", "Digits 8x8: the denoiser, told the class", _DIGITS_COND),
    Recipe("mnist", "MNIST 28x28: a denoiser and a classifier, half an hour on 2 cores", _MNIST),
    Recipe("mnist-judge", "MNIST 28x28: the classifier that judges", _MNIST_JUDGE),
    Recipe("mnist-conditional", "MNIST 28x28: the denoiser, told the class", _MNIST_COND),
]
