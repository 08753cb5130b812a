"""The TD4V module: temporal differences of features, seen by 2D convolutions. Nothing else lives here.

Where it is inserted is the business of the methods (clip/methods/), what it is inserted into of backbone.py and
side_network.py.

Letters: B clips, T frames, H x W the patch grid, N = H*W, D width, d reduced width.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from clip.layers import TemporalProjection
from clip.ops import difference_streams


class TD4V(nn.Module):
    """Temporal difference module; returns the branch, the caller adds it: x + TD4V(x).

    Norm and reduction to d = int(D * ratio); the differences of neighbouring frames, backward and forward, each
    through QuickGELU and its own 3x3 convolution, are added to the reduced features; expansion to D; a learnable
    scalar. A frame without neighbour on one side has the difference 0 there.

    Args:
        width: D.
        ratio: d / D, above 0.
        mode: "FC", reduction and expansion see one frame; "CNN", three.
        zero_init: start the expansion at 0, so that the branch is 0 at step 0 (off in the authors' side network).

    Shape: (B, T, H, W, D) -> (B, T, H, W, D), same dtype; under autocast the branch has autocast's dtype.

    Raises:
        ValueError: reduced width below 1, fewer than two frames.

    Source: the paper's temporal difference module; owlholy/TD4V clip/adapter.py, TD4V.
    """

    def __init__(self, width: int, ratio: float = 1 / 6, mode: Literal["FC", "CNN"] = "CNN", zero_init: bool = False):
        super().__init__()
        reduced, kernel = int(width * ratio), {"FC": 1, "CNN": 3}[mode]
        if reduced < 1:
            raise ValueError(f"TD4V of width {width} and ratio {ratio:g} has no channels left")
        self.norm = nn.BatchNorm1d(width)
        self.down = TemporalProjection(width, reduced, kernel)
        self.conv_backward = nn.Conv2d(reduced, reduced, 3, padding=1)
        self.conv_forward = nn.Conv2d(reduced, reduced, 3, padding=1)
        self.up = TemporalProjection(reduced, width, kernel)
        self.scale = nn.Parameter(torch.ones(1))
        if zero_init:
            nn.init.zeros_(self.up.weight)
            nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        B, T, H, W, D = x.shape
        if T < 2:
            raise ValueError(f"TD4V takes differences of neighbouring frames and got {T} frame")
        x = x.reshape(B, T, H * W, D)
        x = self.down.behind(self.norm, x)  # (B, T, N, d)
        x = difference_streams(x, self.conv_backward, self.conv_forward, (H, W))
        return self.up(x, self.scale).view(B, T, H, W, D)
