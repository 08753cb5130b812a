"""From the loader's pixels to the model's input, on the model's device: bytes are moved there before they become floats."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Normalizer:
    """Turns bytes 0..255 into (value / 255 - mean) / std; floats are taken as normalised already.

    Args:
        mean, std: of each channel, for pixels in 0..1.
    """

    def __init__(self, mean: Sequence[float] = (0.0, 0.0, 0.0), std: Sequence[float] = (1.0, 1.0, 1.0)):
        self.mean, self.std = torch.tensor(mean).view(-1, 1, 1), torch.tensor(std).view(-1, 1, 1)  # (C, 1, 1)
        self._on_device: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def __call__(self, video: Tensor, device: torch.device | str = "cpu") -> Tensor:
        """(..., C, H, W) uint8 or float32 -> float32 on the device, contiguous."""
        video = to_device(video, torch.device(device))
        if video.dtype != torch.uint8:
            return video.contiguous()
        mean, std = self._constants(video.device)
        video = video.to(torch.float32, memory_format=torch.contiguous_format)
        return video.div_(255).sub_(mean).div_(std)

    def _constants(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation on the device, copied once."""
        if device not in self._on_device:
            self._on_device[device] = self.mean.to(device), self.std.to(device)
        return self._on_device[device]

    def undo(self, video: Tensor) -> Tensor:
        """(..., C, H, W) as the loader gives it -> float32 in 0..1, for display."""
        if video.dtype == torch.uint8:
            return video / 255
        return (video.float().cpu() * self.std + self.mean).clamp(0, 1)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device; from pinned memory to a GPU, so that the host does not wait for the copy."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()  # returns a pinned tensor itself
    return tensor.to(device, non_blocking=True)
