"""Diffusion classifiers (Li et al. 2023, arXiv 2303.16203): a denoiser told the class knows the class."""

__version__ = "0.1.0"
