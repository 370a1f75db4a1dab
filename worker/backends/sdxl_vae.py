"""SDXL's autoencoder, from pixels to latents and back. Where half precision overflows in it: once more in float32."""

import logging
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

log = logging.getLogger(__name__)

_Made = TypeVar("_Made")


class Vae:
    """`tiled`, below: in pieces, with less memory, slower. Latents are float32, as the model sees them."""

    def __init__(self, vae: Any, device: Any) -> None:
        self._vae = vae
        self._device = device

    @property
    def dtype(self) -> Any:
        return self._vae.dtype

    def encode(self, image: NDArray[np.uint8], generator: Any, dtype: Any, *, tiled: bool) -> Any | None:
        """The latents of an image (height x width x 3); None: no numbers.

        An image has many, and noise chooses one of them: the generator's next. It is drawn in float32 where the model
        says that it overflows in half precision, else in `dtype`, as diffusers' pipelines do: so a seed says the same.
        """
        pixels = torch.tensor(image).permute(2, 0, 1)[None] / 255 * 2 - 1

        def encoded() -> tuple[Any, Any] | None:
            found = self._vae.encode(pixels.to(self._device, self._vae.dtype)).latent_dist
            return (found.mean.float(), found.std.float()) if torch.isfinite(found.mean + found.std).all() else None

        found = self._exactly_if_need_be("encoding", encoded, tiled)
        if found is None:
            return None
        middle, spread = found
        noise = torch.randn(
            middle.shape, generator=generator, dtype=torch.float32 if self._vae.config.force_upcast else dtype
        )
        mean, deviation = self._scale()
        return (middle + spread * noise.to(self._device, torch.float32) - mean) / deviation

    def decode(self, latents: Any, *, tiled: bool, may_be_black: bool) -> NDArray[np.uint8] | None:
        """Height x width x 3; None: no numbers, or all black, which is what a card makes of them at times."""

        def decoded() -> NDArray[np.uint8] | None:
            mean, deviation = self._scale()
            scaled = (latents * deviation + mean).to(self._vae.dtype)
            image = self._vae.decode(scaled, return_dict=False)[0][0].float()
            if not torch.isfinite(image).all():
                return None
            pixels: NDArray[np.uint8] = (
                ((image / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
            )
            return pixels if may_be_black or pixels.any() else None

        return self._exactly_if_need_be("decoding", decoded, tiled)

    def _exactly_if_need_be(self, doing: str, make: Callable[[], _Made | None], tiled: bool) -> _Made | None:
        (self._vae.enable_tiling if tiled else self._vae.disable_tiling)()
        made = make()
        dtype = self._vae.dtype
        if made is not None or dtype == torch.float32:
            return made
        log.warning("%s a picture in %s gave none: %s it again in float32", doing, dtype, doing)
        try:
            self._vae.to(torch.float32)
            return make()
        finally:
            self._vae.to(dtype)

    def _scale(self) -> tuple[Any, Any]:
        """What latents are, as the autoencoder makes them, before they are the model's: mean and deviation."""
        config = self._vae.config
        mean, deviation = config.get("latents_mean"), config.get("latents_std")
        if mean is None or deviation is None:
            mean, deviation = [0.0], [1.0]
        mean, deviation = (torch.tensor(of).view(1, -1, 1, 1).to(self._device) for of in (mean, deviation))
        return mean, deviation / config.scaling_factor
