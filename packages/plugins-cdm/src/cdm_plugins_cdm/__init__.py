"""Classification diffusion models: a classifier of the noise level whose gradient is the denoiser."""

__version__ = "0.1.0"
