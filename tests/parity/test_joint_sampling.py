"""Agreement with joint diffusion, sample for sample: maps moved with the released sign, and the other.

What one pass of the network computes is compared in `test_joint`.
"""

from __future__ import annotations

from typing import Any

from cdm_core import samplers
from cdm_core.data import DataInfo
from cdm_plugins_joint.adapter import guided
from cdm_plugins_joint.adapter_configs import RepresentationConfig
from cdm_plugins_joint.configs import JointConfig
from cdm_plugins_joint.model import JointModel

SYSTEMS = ("Joint diffusion",)
BACKWARD = 1e-4
SIGNS = {"out/sample_official_sign": "official", "out/sample_paper_sign": "paper"}


def build(golden: Any) -> JointModel:
    """The net of the file, from its metadata alone."""
    net = dict(golden.metadata["unet"])
    size, channels, classes = net.pop("image_size"), net.pop("in_channels"), net.pop("num_classes")
    assert net.pop("train_with_classifier")
    assert net.pop("out_channels") == channels  # eps alone: its variance is the fixed large one
    net.pop("classifier_augmentation")
    net = {"use_scale_shift_norm": False, **net}  # what the official class does unless told otherwise
    config = JointConfig(
        **net | {key: tuple(net[key]) for key in ("channel_mult", "attention_resolutions")},
        head="official",
        diffusion_steps=golden.metadata["diffusion_steps"],
    )
    config.check()
    model = JointModel(config, DataInfo("golden", (channels, size, size), classes))
    model.load_state_dict(golden.weights)
    return model.eval()


def test_samples_of_both_signs(golden: Any) -> None:
    """Over every level, with the recorded noise, predictions of x0 as they come.

    In float64: a walk of an untrained net multiplies rounding errors, and the official ones are enough.
    """
    model, y = build(golden).double(), golden.inputs["y"]
    sigmas = model.sigmas.flip(0)
    start = golden.inputs["x_T"].double() / model.scale(sigmas[:1])
    for name, sign in SIGNS.items():
        config = RepresentationConfig(scale=golden.metadata["sampling_lr"], sign=sign)
        adapted, noise = guided(config, model), iter(golden.inputs["ddpm_noise"].double())
        sample = samplers.ddpm(
            samplers.Conditional(adapted, y),
            start,
            sigmas,
            noise=lambda x, n=noise: next(n),
            variance="large",
        )
        assert next(noise, None) is None  # every recorded draw was used, in order
        golden.compare(name, sample, BACKWARD)
    assert {name for name in golden.expected if name.startswith("out/sample")} == golden.compared
    assert guided(RepresentationConfig(), model).towards == -1  # the released sign is the one that is chosen
