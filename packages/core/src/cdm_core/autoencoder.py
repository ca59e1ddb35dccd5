"""Autoencoders of latent diffusion (Rombach et al. 2022): images as latents, and back.

Loaded from a folder of the library `diffusers`: `AutoencoderKL` (of Stable Diffusion, whose latents DiT was
trained on), or `AutoencoderTiny`, distilled from it: some eighteen times cheaper to look through, which is
what a guide that judges decoded images does at every step.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from cdm_core.diffusers_folder import load, read_json
from cdm_core.errors import UserError

KINDS = ("AutoencoderKL", "AutoencoderTiny")


class Autoencoder:
    """Encoder and decoder in `folder`; not a module: its weights are frozen and no part of the denoiser's.

    scale: what latents were multiplied by for the denoiser, None: as its `config.json` says (0.18215 for
    Stable Diffusion's). checkpoint: a gradient through it recomputes activations block by block. UserError
    where the folder holds no autoencoder, or diffusers is missing.
    """

    def __init__(self, folder: Path, scale: float | None = None, checkpoint: bool = False) -> None:
        if not folder.is_dir():
            raise UserError(f"model.autoencoder: there is no folder {folder}")
        kind = read_json(folder / "config.json").get("_class_name")
        if kind not in KINDS:
            raise UserError(f"model.autoencoder: {folder} holds {kind}, not one of {', '.join(KINDS)}")
        self.net = load(kind, folder).requires_grad_(False)
        if checkpoint:
            self.net.enable_gradient_checkpointing()
        config = self.net.config
        self.scale: float = config.scaling_factor if scale is None else scale
        self.shift: float = getattr(config, "shift_factor", None) or 0.0

    def __deepcopy__(self, memo: dict[int, Any]) -> Autoencoder:
        return self  # frozen: copies of a model, such as its moving average, share it

    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W), about [-1, 1], of latents (B, C, h, w) as denoised; differentiable."""
        return self.net.to(latents.device).decode(latents / self.scale + self.shift).sample

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Latents (B, C, h, w) as denoised of images (B, 3, H, W) in [-1, 1]; differentiable.

        noise (B, C, h, w), standard normal: a draw from the encoder's distribution, None: its mean. An
        autoencoder that has no distribution refuses noise.
        """
        code = self.net.to(images.device).encode(images)
        if hasattr(code, "latents"):
            if noise is not None:
                raise UserError(
                    "this autoencoder gives one latent an image, no distribution: leave out noise"
                )
            return (code.latents - self.shift) * self.scale
        posterior = code.latent_dist
        latents = posterior.mean if noise is None else posterior.mean + posterior.std * noise
        return (latents - self.shift) * self.scale


class Latents(nn.Module):
    """Capabilities `to_images` and `to_latents`, for a model that has been given an autoencoder."""

    autoencoder: Autoencoder | None

    def set_autoencoder(self, folder: str, scale: float | None, checkpoint: bool) -> None:
        """Load the autoencoder in `folder`; "": none."""
        self.autoencoder = Autoencoder(Path(folder), scale, checkpoint) if folder else None

    @property
    def capabilities(self) -> frozenset[str]:
        """What the model can do: see `cdm_core.capabilities.offered`."""
        return frozenset({"denoise"} if self.autoencoder is None else {"denoise", "to_images", "to_latents"})

    @property
    def to_images(self) -> Callable[[Tensor], Tensor]:
        """`Autoencoder.decode`; a model without one has no such attribute."""
        return self._coder().decode

    @property
    def to_latents(self) -> Callable[..., Tensor]:
        """`Autoencoder.encode`; a model without one has no such attribute."""
        return self._coder().encode

    def _coder(self) -> Autoencoder:
        if self.autoencoder is None:
            raise AttributeError("no autoencoder")
        return self.autoencoder
