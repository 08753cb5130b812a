"""TAda2D: a ResNet-50 whose 3 x 3 convolutions are temporally adaptive."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from clip.layers import light, recomputed
from configs.schema import Config, ConfigError
from models.imagenet import imagenet_weights, load_backbone, require_depths, require_image_network
from models.parameters import Origin
from models.renaming import Rule, renamed
from models.tadaconv import (
    ROUTE_NAMES,
    SMALLEST_T,
    RouteFunction,
    TAdaConv2d,
    as_clips,
    as_images,
    average_over_time,
    renamed_weights,
)

WIDTH = 64  # of the stem and inside the blocks of the first stage; each later stage has twice as many channels
DEPTHS = (3, 4, 6, 3)
SMALLEST_WIDTH = 4  # the route functions have a quarter of it


@dataclass(frozen=True)
class Options:
    """`network.options` of tada2d."""

    depths: tuple[int, int, int, int] = DEPTHS  # blocks of each stage
    width: int = WIDTH  # channels of the stem


class TAdaBlock(nn.Module):
    """A bottleneck block, whose 3 x 3 convolution is a TAdaConv followed by an average over neighbouring frames.

        y = relu(norm_b(conv(y)) + norm_average(mean of three frames of conv(y)))

    `norm_average` starts at zero.

    Args:
        in_width: channels of the input.
        width: channels inside; the output has 4 * width.
        stride: of the 3 x 3 convolution and of the shortcut, which is a convolution where stride or width change.

    Shape: images (B*T, in_width, H, W) and T -> (B*T, 4 * width, H / stride, W / stride).

    Source: TAdaConv, tadaconv/models/base/base_blocks.py and branches/tada_branch.py, TAda2DBlock.
    """

    def __init__(self, in_width: int, width: int, stride: int):
        super().__init__()
        self.shortcut = None
        if stride != 1 or in_width != 4 * width:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_width, 4 * width, 1, stride=stride, bias=False), nn.BatchNorm2d(4 * width)
            )
        self.conv_a = nn.Conv2d(in_width, width, 1, bias=False)
        self.norm_a = nn.BatchNorm2d(width)
        self.conv_b = TAdaConv2d(width, width, 3, stride=stride, padding=1)
        self.route = RouteFunction(width)
        self.norm_b = nn.BatchNorm2d(width)
        self.norm_average = nn.BatchNorm2d(width)
        self.conv_c = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.norm_c = nn.BatchNorm2d(4 * width)

    def forward(self, x: Tensor, frames: int) -> Tensor:
        y = light(self, self.middle, self.conv_a(x), frames)
        y = self.norm_c(light(self, self.last, y, frames))
        return F.relu(y + (x if self.shortcut is None else self.shortcut(x)), inplace=True)

    def middle(self, y: Tensor, frames: int) -> Tensor:
        """From the first convolution to the TAdaConv: (B*T, width, H, W) -> (B*T, width, H / stride, W / stride)."""
        y = as_clips(F.relu(self.norm_a(y), inplace=True), frames)  # (B, width, T, H, W)
        return as_images(self.conv_b(y, self.route(y)))

    def last(self, y: Tensor, frames: int) -> Tensor:
        """From the TAdaConv to the last convolution: (B*T, width, H, W) -> (B*T, 4 * width, H, W)."""
        average = as_images(average_over_time(as_clips(y, frames)))
        return self.conv_c(F.relu(self.norm_b(y) + self.norm_average(average), inplace=True))


class TAda2D(nn.Module):
    """TAda2D on a ResNet-50. Every stage halves the map, and there is no max-pooling. All parameters are trainable.

    At the start it equals the ResNet on single frames: all factors are 1 and the averages over time have no weight.

    Args:
        num_classes: K.
        depths: blocks of each stage.
        width: channels of the stem.
        dropout: probability before the classifier.
        recompute: save only the input of each block for backward.

    Shape: video (B, T, 3, height, width), normalised, T >= 3 -> logits (B, K).

    Source: Huang et al., ICLR 2022 (arXiv 2110.06178), section 3; TAdaConv, tadaconv/models/base/models.py.
    """

    frames_per_segment = 1
    mean, std = (0.45,) * 3, (0.225,) * 3

    def __init__(
        self,
        *,
        num_classes: int,
        depths: tuple[int, ...] = DEPTHS,
        width: int = WIDTH,
        dropout: float = 0.0,
        recompute: bool = False,
    ):
        super().__init__()
        self.recompute = recompute
        self.origin = Origin(f"ResNet-{3 * sum(depths) + 2}", "random weights")
        self.stem = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        self.stem_norm = nn.BatchNorm2d(width)
        self.stages, in_width = nn.ModuleList(), width
        for i, depth in enumerate(depths):
            inside = width * 2**i
            blocks = [TAdaBlock(4 * inside if j else in_width, inside, stride=1 if j else 2) for j in range(depth)]
            self.stages.append(nn.ModuleList(blocks))
            in_width = 4 * inside
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(in_width, num_classes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """He-normal convolutions, zero biases; TAdaConvs, routes' last convolutions and the classifier keep their own."""
        for module in self.modules():
            if isinstance(module, TAdaConv2d):
                continue
            if isinstance(module, nn.Conv1d | nn.Conv2d) or (isinstance(module, nn.Linear) and module is not self.head):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for block in self.blocks():
            nn.init.zeros_(block.route.expand.weight)
            nn.init.zeros_(block.norm_average.weight)

    def blocks(self) -> list[TAdaBlock]:
        """All blocks, from input to output."""
        return [block for stage in self.stages for block in stage]

    def trainable_modules(self) -> dict[str, nn.Module]:
        """All parameters, by name."""
        return {"stem": self.stem, "stem_norm": self.stem_norm, "stages": self.stages, "head": self.head}

    def trainable_layers(self) -> list[list[nn.Module]]:
        """From input to output: the stem, each block, the classifier."""
        return [[self.stem, self.stem_norm], *([block] for block in self.blocks()), [self.head]]

    def forward(self, video: Tensor) -> Tensor:
        return self.head(self.dropout(self.features(video)))

    def features(self, video: Tensor) -> Tensor:
        """The input of the classifier: (B, T, 3, height, width) -> (B, D)."""
        B, T = video.shape[:2]
        x = F.relu(self.stem_norm(self.stem(video.flatten(0, 1))), inplace=True)  # (B*T, 64, height / 2, width / 2)
        for block in self.blocks():
            x = recomputed(block, block, x, T) if self.recompute and self.training else block(x, T)
        return x.mean((2, 3)).unflatten(0, (B, T)).mean(1)  # (B, D)


def build(config: Config, options: Options) -> TAda2D:
    """The model of a configuration.

    Raises:
        ConfigError: too few frames, sizes that do not fit, weights that cannot be read or do not fit.
    """
    if config.data.num_segments < SMALLEST_T:
        raise ConfigError(
            f"data.num_segments: tada2d averages over {SMALLEST_T} neighbouring frames and needs as many, "
            f"not {config.data.num_segments}"
        )
    if options.width < SMALLEST_WIDTH:
        raise ConfigError(f"network.options.width: must be at least {SMALLEST_WIDTH}, not {options.width}")
    require_depths(options.depths)
    model = TAda2D(
        num_classes=config.data.num_classes,
        depths=options.depths,
        width=options.width,
        dropout=config.network.drop_fc,
        recompute=config.network.recompute,
    )
    if config.network.init:
        require_image_network(options, "depths", "width")
        values, source = imagenet_weights(config.network.weights, "resnet50")
        load_backbone(model, from_resnet(values), source)
    return model


# torchvision's names of a ResNet's weights -> ours
_FROM_RESNET: tuple[Rule, ...] = (
    (r"^conv1\.", "stem."),
    (r"^bn1\.", "stem_norm."),
    (r"^layer(\d)\.", lambda match: f"stages.{int(match[1]) - 1}."),
    (r"\.conv([123])\.", lambda match: f".conv_{'abc'[int(match[1]) - 1]}."),
    (r"\.bn([123])\.", lambda match: f".norm_{'abc'[int(match[1]) - 1]}."),
    (r"\.downsample\.", ".shortcut."),
)


def from_resnet(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of torchvision's ResNet under our names."""
    return {renamed(key, _FROM_RESNET): value for key, value in values.items()}


# The authors' names -> ours
FROM_PUBLISHED: tuple[Rule, ...] = (
    (r"^backbone\.conv1\.a\.", "stem."),
    (r"^backbone\.conv1\.a_bn\.", "stem_norm."),
    (r"^backbone\.conv(\d)\.res_(\d+)\.", lambda match: f"stages.{int(match[1]) - 2}.{int(match[2]) - 1}."),
    (r"(^|\.)short_cut\.", r"\1shortcut.0."),
    (r"(^|\.)short_cut_bn\.", r"\1shortcut.1."),
    (r"(^|\.)conv_branch\.b_rf\.", r"\1route."),
    (r"(^|\.)conv_branch\.b_avgpool_bn\.", r"\1norm_average."),
    (r"(^|\.)conv_branch\.([abc])_bn\.", r"\1norm_\2."),
    (r"(^|\.)conv_branch\.([abc])\.", r"\1conv_\2."),
    *ROUTE_NAMES,
    (r"^head\.out\.", "head."),
)


# Our names -> the authors'
_TO_PUBLISHED: tuple[Rule, ...] = (
    (r"^head\.", "head.out."),
    (r"^stem\.", "backbone.conv1.a."),
    (r"^stem_norm\.", "backbone.conv1.a_bn."),
    (r"^stages\.(\d+)\.(\d+)\.", lambda match: f"backbone.conv{int(match[1]) + 2}.res_{int(match[2]) + 1}."),
    (r"\.shortcut\.0\.", ".short_cut."),
    (r"\.shortcut\.1\.", ".short_cut_bn."),
    (r"\.route\.clip\.", ".conv_branch.b_rf.g."),
    (r"\.route\.reduce\.", ".conv_branch.b_rf.a."),
    (r"\.route\.norm\.", ".conv_branch.b_rf.bn."),
    (r"\.route\.expand\.", ".conv_branch.b_rf.b."),
    (r"\.norm_average\.", ".conv_branch.b_avgpool_bn."),
    (r"\.norm_([abc])\.", r".conv_branch.\1_bn."),
    (r"\.conv_([abc])\.", r".conv_branch.\1."),
)


def from_published(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """The authors' weights under our names, or None if these are not theirs.

    Args:
        state_dict: of their model, or of one of its blocks.
    """
    if not any(key.endswith("conv_branch.b_rf.g.weight") for key in state_dict):
        return None
    return renamed_weights(state_dict, FROM_PUBLISHED)


def published_name(key: str) -> str:
    """The authors' name for one of ours."""
    return renamed(key, _TO_PUBLISHED)
