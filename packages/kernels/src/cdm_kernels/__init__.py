"""Operators of the denoiser path, right in first and second order."""

from cdm_kernels.attention import attention
from cdm_kernels.concatenate import concatenate
from cdm_kernels.conv2d import conv2d
from cdm_kernels.dispatch import first_order, use
from cdm_kernels.group_norm_silu import group_norm_silu
from cdm_kernels.head import (
    cumulative_logits,
    log_ratio,
    noise_level_cross_entropy,
    noise_level_head,
    suffix_table,
)
from cdm_kernels.mean_conv3x3 import mean_conv3x3
from cdm_kernels.softmax_gradient import softmax_gradient
from cdm_kernels.timestep_embedding import (
    adm_embedding,
    ddpm_embedding,
    edm_fourier_embedding,
    edm_positional_embedding,
)
from cdm_kernels.upsample_conv3x3 import upsample_conv3x3

__version__ = "0.1.0"
__all__ = [
    "adm_embedding",
    "attention",
    "concatenate",
    "conv2d",
    "cumulative_logits",
    "ddpm_embedding",
    "edm_fourier_embedding",
    "edm_positional_embedding",
    "first_order",
    "group_norm_silu",
    "log_ratio",
    "mean_conv3x3",
    "noise_level_cross_entropy",
    "noise_level_head",
    "softmax_gradient",
    "suffix_table",
    "upsample_conv3x3",
    "use",
]
