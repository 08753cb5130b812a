"""A small convolutional model without CLIP, which uses all that the contract of models/registry.py offers it.

python -m tests.helpers.small_conv train_vision.py ...      runs an entry point that knows the model
"""

from __future__ import annotations

import runpy
import sys
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from configs.schema import Config, ConfigError
from models.parameters import Origin, Scale
from models.registry import MODELS


@dataclass(frozen=True)
class Options:
    """`network.options` of small_conv."""

    width: int = 8


class SmallConv(nn.Module):
    """Two convolutions on the three frames of each segment, the mean over segments, and a classifier. All is trained.

    Args:
        num_classes: K.
        width: channels.
        dropout: probability before the classifier.

    Shape: video (B, T*3, 3, height, width), segment by segment -> logits (B, K).
    """

    frames_per_segment = 3
    mean, std = (0.5, 0.4, 0.3), (0.25, 0.2, 0.3)

    def __init__(self, *, num_classes: int, width: int = 8, dropout: float = 0.0):
        super().__init__()
        self.origin = Origin(name="small_conv", weights="random weights")
        self.stem = nn.Sequential(nn.Conv2d(9, width, 3, stride=2, padding=1), nn.BatchNorm2d(width), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(width, width, 3, stride=2, padding=1), nn.BatchNorm2d(width), nn.ReLU())
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(width, num_classes)

    def trainable_modules(self) -> dict[str, nn.Module]:
        return {"stem": self.stem, "body": self.body, "head": self.head}

    def trainable_layers(self) -> list[list[nn.Module]]:
        return [[self.stem], [self.body], [self.head]]

    def parameter_scale(self, name: str, parameter: nn.Parameter) -> Scale:
        """Biases learn twice as fast without weight decay, the classifier's weight five times as fast."""
        if name.endswith(".bias"):
            return Scale(lr=2.0, weight_decay=0.0)
        return Scale(lr=5.0) if name == "head.weight" else Scale()

    def forward(self, video: Tensor) -> Tensor:
        segments = video.unflatten(1, (-1, self.frames_per_segment))  # (B, T, 3, 3, height, width)
        B, T = segments.shape[:2]
        x = self.body(self.stem(segments.flatten(2, 3).flatten(0, 1)))  # (B*T, width, height / 4, width / 4)
        features = x.mean((2, 3)).unflatten(0, (B, T)).mean(1)  # (B, width)
        return self.head(self.dropout(features))


def build(config: Config, options: Options) -> SmallConv:
    """The model of a configuration."""
    if options.width < 1:
        raise ConfigError(f"network.options.width: must be above 0, not {options.width}")
    return SmallConv(num_classes=config.data.num_classes, width=options.width, dropout=config.network.drop_fc)


if __name__ == "__main__":
    MODELS["small_conv"] = sys.modules[__name__]
    script = Path(__file__).parents[2] / sys.argv[1]
    sys.argv = [str(script), *sys.argv[2:]]
    runpy.run_path(str(script), run_name="__main__")
