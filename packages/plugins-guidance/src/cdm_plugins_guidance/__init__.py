"""Off-the-shelf guidance (Ma et al. 2024, arXiv 2310.11311): any classifier steers any denoiser."""

__version__ = "0.1.0"
