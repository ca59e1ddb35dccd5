"""Agreement with joint diffusion, tensor for tensor: the path, the U-Net, its middle, and the head.

Samples are compared in `test_joint_sampling`.
"""

from __future__ import annotations

from typing import Any

import torch

from cdm_core.data import DataInfo
from cdm_plugins_joint.configs import JointConfig
from cdm_plugins_joint.model import JointModel

SYSTEMS = ("Joint diffusion",)
FORWARD = 2e-5


def build(golden: Any) -> JointModel:
    """The net of the file, from its metadata alone; what that does not say is as in the released class."""
    net = {"use_scale_shift_norm": False, **golden.metadata["unet"]}
    size, channels, classes = net.pop("image_size"), net.pop("in_channels"), net.pop("num_classes")
    assert net.pop("train_with_classifier")
    net.pop("classifier_augmentation")
    outputs = net.pop("out_channels")
    config = JointConfig(
        **net | {key: tuple(net[key]) for key in ("channel_mult", "attention_resolutions")},
        head="official",
        learn_sigma=outputs == 2 * channels,
        diffusion_steps=golden.metadata["diffusion_steps"],
    )
    config.check()
    model = JointModel(config, DataInfo("golden", (channels, size, size), classes))
    model.load_state_dict(golden.weights)
    return model.eval()


@torch.no_grad()
def test_every_tensor_of_one_pass(golden: Any) -> None:
    model, x0 = build(golden), golden.inputs["x0"]
    t = golden.inputs["t"].long()
    alpha2 = model.path.alpha.square()
    golden.compare("out/betas", 1 - alpha2 / torch.cat([alpha2.new_ones(1), alpha2[:-1]]), 1e-12)
    golden.compare("out/model", model(x0, t), FORWARD)  # of x0 as it is, whatever t
    golden.compare("out/bottleneck", model.encode(x0, model.embed(t)).middle, FORWARD)
    golden.compare("out/logits_x0_t0", model.class_logits(x0, torch.zeros(len(x0))), FORWARD)
    assert set(golden.expected) - golden.compared == {"out/sample_official_sign", "out/sample_paper_sign"}
