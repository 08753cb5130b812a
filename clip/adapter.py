"""The TD4V module: temporal differences of features, seen by 2D convolutions. It fits into any video network.

Letters: B clips, T frames, H x W patches a frame, N = H*W, D width, d reduced width.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from clip.layers import TemporalProjection
from clip.ops import difference_streams


class TD4V(nn.Module):
    """Temporal difference module. It returns a branch, which the caller adds to its input.

    Norm and reduction to d = int(D * ratio). The differences between each frame and the next, and each frame and the
    previous one, each through QuickGELU and a 3x3 convolution of its own, are added to the reduced features. Expansion
    to D, times a learnable scalar. A frame without a neighbour on one side has the difference 0 there.

    In a network of your own, between two blocks:

        td4v = TD4V(width=768, zero_init=True)             # once, in __init__
        video = x.view(B, T, H, W, 768)                    # your features, for example patch tokens (B*T, H*W, 768)
        x = x + td4v(video).view_as(x)                     # the same shape as x

    With `zero_init` the network then computes what it did before until it is trained.

    Args:
        width: D.
        ratio: d / D, above 0.
        mode: "FC", reduction and expansion see one frame; "CNN", they see three.
        zero_init: start the expansion at 0, so that the branch is 0 at step 0. It is off in the authors' side network.

    Shape: (B, T, H, W, D) -> (B, T, H, W, D), same dtype; under autocast the branch has autocast's dtype.

    Raises:
        ValueError: a reduced width below 1, fewer than two frames.

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
        x = self.down.after_norm(self.norm, x.reshape(B, T, H * W, D))  # (B, T, N, d)
        x = difference_streams(x, self.conv_backward, self.conv_forward, (H, W))
        return self.up(x, self.scale).view(B, T, H, W, D)
