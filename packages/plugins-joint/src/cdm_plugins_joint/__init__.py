"""Joint diffusion (Deja et al. 2023, arXiv 2301.13622): one U-Net that denoises and classifies."""

__version__ = "0.1.0"
