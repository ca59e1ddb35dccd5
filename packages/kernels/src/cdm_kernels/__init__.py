"""Operators of the denoiser path, right in first and second order."""

__version__ = "0.1.0"
