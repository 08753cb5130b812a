"""TDN: a ResNet that reads five frames a segment, with differences inside a segment and between segments."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from clip.layers import light, recomputed
from configs.schema import Config, ConfigError
from models.imagenet import imagenet_weights, load_backbone, require_depths, require_image_network
from models.parameters import Origin
from models.renaming import Rule, renamed

logger = logging.getLogger("td4v")

DEPTHS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
WIDTH = 64  # of the stem and inside the blocks of the first stage; each later stage has twice as many channels
FRAMES = 5  # of a segment
SMALLEST_SIDE = 33  # pixels: the last stage pools maps of at least 2 x 2
SHIFT_DIVISOR = 8  # one part in eight takes the next segment, one the previous


@dataclass(frozen=True)
class Options:
    """`network.options` of tdn."""

    depth: Literal[50, 101] = 50  # of the ResNet
    depths: Optional[tuple[int, int, int, int]] = None  # blocks of each stage; null: those of `depth`
    width: int = WIDTH  # channels of the stem, a multiple of 8


class SegmentExcitation(nn.Module):
    """TDN's long-term module: channels are weighted by differences between neighbouring segments, at two scales.

    Args:
        channels: C; the segments are compared in a sixteenth of them.

    Shape: (B*T, C, H, W) and T, H and W at least 2 -> (B*T, C, H, W).

    Source: Wang et al., CVPR 2021 (arXiv 2012.10071), section 3.3; TDN, ops/base_module.py, mSEModule.
    """

    def __init__(self, channels: int):
        super().__init__()
        reduced = channels // 16
        self.reduce = nn.Conv2d(channels, reduced, 1, bias=False)
        self.norm = nn.BatchNorm2d(reduced)
        self.smooth = nn.Conv2d(reduced, reduced, 3, padding=1, groups=reduced, bias=False)
        self.expand = nn.Conv2d(reduced, channels, 1, bias=False)
        self.norm_expand = nn.BatchNorm2d(channels)
        self.conv_half = nn.Conv2d(reduced, reduced, 3, padding=1, bias=False)
        self.norm_half = nn.BatchNorm2d(reduced)
        self.conv_full = nn.Conv2d(reduced, reduced, 3, padding=1, bias=False)
        self.norm_full = nn.BatchNorm2d(reduced)

    def forward(self, x: Tensor, segments: int) -> Tensor:
        here = self.norm(self.reduce(x))  # (B*T, r, H, W)
        there = self.smooth(here).unflatten(0, (-1, segments))  # (B, T, r, H, W)
        here = here.unflatten(0, (-1, segments))
        to_next = F.pad(there[:, 1:] - here[:, :-1], (0, 0) * 3 + (0, 1))  # the last segment has no next: 0
        to_previous = F.pad(there[:, :-1] - here[:, 1:], (0, 0) * 3 + (1, 0))
        # One after the other: in training each has batch statistics of its own, and the running ones move twice.
        gate = self.gate(to_next.flatten(0, 1)) + self.gate(to_previous.flatten(0, 1))
        return x * (gate + 1).mul_(0.5)  # x + x * mean of (gate - 0.5)

    def gate(self, difference: Tensor) -> Tensor:
        """(B*T, r, H, W) -> (B*T, C, H, W) in 0..1."""
        half = self.norm_half(self.conv_half(F.avg_pool2d(difference, 2)))
        half = F.interpolate(half, difference.shape[2:])  # nearest
        full = self.norm_full(self.conv_full(difference))
        return torch.sigmoid(self.norm_expand(self.expand((difference + half + full) / 3)))


class SegmentShift(nn.Module):
    """A convolution over three segments, one filter a channel, that starts as a shift.

    The first eighth of the channels takes the next segment's, the second eighth the previous one's, the rest its own.

    Args:
        channels: C, a multiple of 8.

    Shape: (B*T, C, H, W) and T -> (B*T, C, H, W).

    Source: TDN, ops/base_module.py, ShiftModule.
    """

    def __init__(self, channels: int):
        super().__init__()
        fold = channels // SHIFT_DIVISOR
        self.weight = nn.Parameter(torch.zeros(channels, 1, 3))
        with torch.no_grad():
            self.weight[:fold, 0, 2] = 1
            self.weight[fold : 2 * fold, 0, 0] = 1
            self.weight[2 * fold :, 0, 1] = 1

    def forward(self, x: Tensor, segments: int) -> Tensor:
        weight = self.weight.to(x.dtype).squeeze(1)[..., None, None]  # (C, 3, 1, 1)
        return _Shift.apply(x.unflatten(0, (-1, segments)), weight).flatten(0, 1)


class _Shift(torch.autograd.Function):
    """The sums of SegmentShift, one pass for each tap: (B, T, C, H, W), (C, 3, 1, 1) -> (B, T, C, H, W)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _shifted_sum(x, *weight.unbind(1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        previous, own, following = weight.unbind(1)
        pairs = (dy[:, 1:], x[:, :-1]), (dy, x), (dy[:, :-1], x[:, 1:])
        dweight = torch.stack([(a * b).sum((0, 1, 3, 4)) for a, b in pairs], 1)  # (C, 3)
        return _shifted_sum(dy, following, own, previous), dweight[..., None, None]


def _shifted_sum(x: Tensor, previous: Tensor, own: Tensor, following: Tensor) -> Tensor:
    """Weighted sum of each segment and its neighbours: (B, T, C, H, W), weights (C, 1, 1)."""
    y = own * x
    y[:, 1:].addcmul_(previous, x[:, :-1])
    y[:, :-1].addcmul_(following, x[:, 1:])
    return y


class Bottleneck(nn.Module):
    """A ResNet's bottleneck block, whose convolutions have biases; with the two temporal modules after the first.

    Args:
        in_width: channels of the input.
        width: channels inside; the output has 4 * width.
        stride: of the 3 x 3 convolution and of the shortcut.
        temporal: whether the block has the temporal modules (stages 2 to 4).
        has_shortcut: whether the shortcut is a convolution (first block of a stage).

    Shape: (B*T, in_width, H, W) and T -> (B*T, 4 * width, H / stride, W / stride).

    Source: TDN, ops/base_module.py, BottleneckShift.
    """

    def __init__(self, in_width: int, width: int, *, stride: int, temporal: bool, has_shortcut: bool):
        super().__init__()
        out_width = 4 * width
        self.conv1, self.norm1 = nn.Conv2d(in_width, width, 1), nn.BatchNorm2d(width)
        self.conv2, self.norm2 = nn.Conv2d(width, width, 3, stride=stride, padding=1), nn.BatchNorm2d(width)
        self.conv3, self.norm3 = nn.Conv2d(width, out_width, 1), nn.BatchNorm2d(out_width)
        self.shortcut = None
        if has_shortcut:
            self.shortcut = nn.Sequential(nn.Conv2d(in_width, out_width, 1, stride=stride), nn.BatchNorm2d(out_width))
        self.excitation = SegmentExcitation(width) if temporal else None
        self.shift = SegmentShift(width) if temporal else None

    def forward(self, x: Tensor, segments: int) -> Tensor:
        y = light(self, self.middle, self.conv1(x), segments)
        y = light(self, self.last, y)
        y = self.norm3(y)
        return F.relu(y + (x if self.shortcut is None else self.shortcut(x)), inplace=True)

    def middle(self, y: Tensor, segments: int) -> Tensor:
        """From the first convolution to the second: (B*T, width, H, W) -> (B*T, width, H / stride, W / stride)."""
        y = F.relu(self.norm1(y), inplace=True)
        if self.excitation is not None:
            y = self.shift(self.excitation(y, segments), segments)
        return self.conv2(y)

    def last(self, y: Tensor) -> Tensor:
        return self.conv3(F.relu(self.norm2(y), inplace=True))


def make_stage(in_width: int, width: int, *, depth: int, stride: int, temporal: bool) -> nn.ModuleList:
    """The blocks of a stage; the first changes size and width."""
    return nn.ModuleList(
        Bottleneck(
            4 * width if i else in_width,
            width,
            stride=1 if i else stride,
            temporal=temporal,
            has_shortcut=i == 0,
        )
        for i in range(depth)
    )


class TDN(nn.Module):
    """TDN on a ResNet-50 or -101. All parameters are trainable.

    The middle frame of a segment goes through the ResNet. The four differences of its frames go through a stem and a
    first stage of their own, which join the ResNet after its stem and after its first stage:

        x = a * stem(middle frame) + b * up(d0),   d0 = difference_stem(differences)
        x = a * stage1(x) + b * up(d1),            d1 = difference_stage(d0)

    with a = b = 0.5 for T = 8, a = 0.75 and b = 0.25 for any other T, constants of the authors. Logits are averaged over
    the segments.

    Args:
        num_classes: K.
        segments: T.
        depths: blocks of each stage.
        width: channels of the stem.
        dropout: probability before the classifier.
        recompute: save only the input of each block for backward.

    Shape: video (B, T*5, 3, height, width), normalised, segment by segment, sides of at least 33 pixels -> logits (B, K).

    Source: Wang et al., CVPR 2021 (arXiv 2012.10071); TDN, ops/tdn_net.py, TDN_Net, and ops/models.py, TSN.
    """

    frames_per_segment = FRAMES
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

    def __init__(
        self,
        *,
        num_classes: int,
        segments: int,
        depths: tuple[int, ...] = DEPTHS[50],
        width: int = WIDTH,
        dropout: float = 0.0,
        recompute: bool = False,
    ):
        super().__init__()
        self.origin = Origin(f"ResNet-{3 * sum(depths) + 2}", "random weights")
        self.segments, self.recompute = segments, recompute
        self.share = 0.5 if segments == 8 else 0.75  # a; b is 1 - a
        self.stem, self.stem_norm = nn.Conv2d(3, width, 7, stride=2, padding=3), nn.BatchNorm2d(width)
        self.difference_stem = nn.Conv2d(3 * (FRAMES - 1), width, 7, stride=2, padding=3, bias=False)
        self.difference_norm = nn.BatchNorm2d(width)
        self.difference_stage = make_stage(width, width, depth=depths[0], stride=1, temporal=False)
        self.stages, in_width = nn.ModuleList(), width
        for i, depth in enumerate(depths):
            inside = width * 2**i
            self.stages.append(make_stage(in_width, inside, depth=depth, stride=2 if i else 1, temporal=i > 0))
            in_width = 4 * inside
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(in_width, num_classes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """He-normal convolutions with PyTorch's biases, and a classifier near zero."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.normal_(self.head.weight, std=0.001)
        nn.init.zeros_(self.head.bias)

    def trainable_modules(self) -> dict[str, nn.Module]:
        """All parameters, by name."""
        names = ("stem", "stem_norm", "difference_stem", "difference_norm", "difference_stage", "stages", "head")
        return {name: getattr(self, name) for name in names}

    def trainable_layers(self) -> list[list[nn.Module]]:
        """From input to output: both stems, the first stages, each later block, the classifier."""
        first = [self.stem, self.stem_norm, self.difference_stem, self.difference_norm]
        blocks = [[block] for stage in self.stages[1:] for block in stage]
        return [first, [self.difference_stage, self.stages[0]], *blocks, [self.head]]

    def forward(self, video: Tensor) -> Tensor:
        logits = self.head(self.dropout(self.segment_features(video)))  # (B*T, K)
        return logits.unflatten(0, (-1, self.segments)).mean(1)

    def segment_features(self, video: Tensor) -> Tensor:
        """The input of the classifier for each segment: (B, T*5, 3, height, width) -> (B*T, D)."""
        if video.shape[1] != FRAMES * self.segments:
            raise ValueError(f"the model was built for {self.segments} x {FRAMES} frames and got {video.shape[1]}")
        x = self.short_term(video.unflatten(1, (-1, FRAMES)).flatten(0, 1))  # (B*T, 256, height / 4, width / 4)
        for stage in self.stages[1:]:
            for block in stage:
                x = self.run_block(block, x)
        return x.mean((2, 3))

    def short_term(self, frames: Tensor) -> Tensor:
        """Stem, first stage and difference branch: (B*T, 5, 3, height, width) -> (B*T, 256, height / 4, width / 4)."""
        differences = (frames[:, 1:] - frames[:, :-1]).flatten(1, 2)  # (B*T, 12, height, width)
        d = self.difference_norm(self.difference_stem(F.avg_pool2d(differences, 2)))
        d = F.max_pool2d(F.relu(d, inplace=True), 3, stride=2, padding=1)  # (B*T, 64, height / 8, width / 8)
        x = frames[:, FRAMES // 2].contiguous()  # a view would keep all five frames for backward
        x = self.stem_norm(self.stem(x))
        x = F.max_pool2d(F.relu(x, inplace=True), 3, stride=2, padding=1)  # (B*T, 64, height / 4, width / 4)
        x = self.join(x, d)
        for block in self.difference_stage:
            d = self.run_block(block, d)
        for block in self.stages[0]:
            x = self.run_block(block, x)
        return self.join(x, d)

    def run_block(self, block: nn.Module, x: Tensor) -> Tensor:
        """A block, whose activations are computed again in backward if the model is to."""
        if self.recompute and self.training:
            return recomputed(block, block, x, self.segments)
        return block(x, self.segments)

    def join(self, x: Tensor, d: Tensor) -> Tensor:
        """The weighted sum of the ResNet's map and the enlarged map of the differences."""
        return self.share * x + (1 - self.share) * F.interpolate(d, x.shape[2:])  # nearest


def build(config: Config, options: Options) -> TDN:
    """The model of a configuration.

    Raises:
        ConfigError: inputs that are too small, sizes that do not fit, weights that cannot be read or do not fit.
    """
    if config.data.input_size < SMALLEST_SIDE:
        raise ConfigError(
            f"data.input_size: tdn needs at least {SMALLEST_SIDE} pixels, not {config.data.input_size}: "
            "its last stage pools maps of 2 x 2"
        )
    if options.width < SHIFT_DIVISOR or options.width % SHIFT_DIVISOR:
        raise ConfigError(f"network.options.width: must be a multiple of {SHIFT_DIVISOR}, not {options.width}")
    require_depths(options.depths)
    depths = options.depths or DEPTHS[options.depth]
    model = TDN(
        num_classes=config.data.num_classes,
        segments=config.data.num_segments,
        depths=depths,
        width=options.width,
        dropout=config.network.drop_fc,
        recompute=config.network.recompute,
    )
    if config.network.init:
        require_image_network(options, "depths", "width")
        values, source = imagenet_weights(config.network.weights, f"resnet{options.depth}")
        load_backbone(model, from_resnet(values), source)
    return model


# torchvision's names of a ResNet's weights -> ours
_FROM_RESNET: tuple[Rule, ...] = (
    (r"^conv1\.", "stem."),
    (r"^bn1\.", "stem_norm."),
    (r"^layer(\d)\.", lambda match: f"stages.{int(match[1]) - 1}."),
    (r"\.bn([123])\.", r".norm\1."),
    (r"\.downsample\.", ".shortcut."),
)


def from_resnet(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A ResNet's weights; the difference branch starts from its stem and from its first stage."""
    ours = {renamed(key, _FROM_RESNET): value for key, value in values.items()}
    first = {key.replace("stages.0.", "difference_stage.", 1): value for key, value in ours.items()}
    mean = values["conv1.weight"].mean(1, keepdim=True)  # over R, G and B
    return {**first, **ours, "difference_stem.weight": mean.expand(-1, 3 * (FRAMES - 1), -1, -1)}


# The authors' names -> ours
FROM_PUBLISHED: tuple[Rule, ...] = (
    (r"^base_model\.", ""),
    (r"^(new_fc|fc)\.", "head."),
    (r"^conv1_5\.0\.", "difference_stem."),
    (r"^conv1_5\.1\.", "difference_norm."),
    (r"^resnext_layer1\.", "difference_stage."),
    (r"^layer(\d)_bak\.", lambda match: f"stages.{int(match[1]) - 1}."),
    (r"(^|\.)mse\.conv1\.", r"\1excitation.reduce."),
    (r"(^|\.)mse\.bn1\.", r"\1excitation.norm."),
    (r"(^|\.)mse\.conv2\.", r"\1excitation.smooth."),
    (r"(^|\.)mse\.conv3\.", r"\1excitation.expand."),
    (r"(^|\.)mse\.bn3\.", r"\1excitation.norm_expand."),
    (r"(^|\.)mse\.(conv|bn)3_smallscale2\.", lambda match: f"{match[1]}excitation.{_KINDS[match[2]]}_half."),
    (r"(^|\.)mse\.(conv|bn)3_smallscale4\.", lambda match: f"{match[1]}excitation.{_KINDS[match[2]]}_full."),
    (r"(^|\.)shift\.conv\.", r"\1shift."),
    (r"(^|\.)bn([123])\.", r"\1norm\2."),
    (r"(^|\.)downsample\.", r"\1shortcut."),
    (r"^conv1\.", "stem."),
    (r"^norm1\.", "stem_norm."),
)
_KINDS = {"conv": "conv", "bn": "norm"}
# Our names -> the authors', without `base_model.`
_TO_PUBLISHED: tuple[Rule, ...] = (
    (r"^head\.", "new_fc."),
    (r"^difference_stem\.", "conv1_5.0."),
    (r"^difference_norm\.", "conv1_5.1."),
    (r"^difference_stage\.", "resnext_layer1."),
    (r"^stages\.(\d)\.", lambda match: f"layer{int(match[1]) + 1}_bak."),
    (r"\.excitation\.reduce\.", ".mse.conv1."),
    (r"\.excitation\.norm\.", ".mse.bn1."),
    (r"\.excitation\.smooth\.", ".mse.conv2."),
    (r"\.excitation\.expand\.", ".mse.conv3."),
    (r"\.excitation\.norm_expand\.", ".mse.bn3."),
    (r"\.excitation\.conv_(half|full)\.", lambda match: f".mse.conv3_smallscale{_SCALES[match[1]]}."),
    (r"\.excitation\.norm_(half|full)\.", lambda match: f".mse.bn3_smallscale{_SCALES[match[1]]}."),
    (r"\.shift\.", ".shift.conv."),
    (r"\.norm([123])\.", r".bn\1."),
    (r"\.shortcut\.", ".downsample."),
    (r"^stem\.", "conv1."),
    (r"^stem_norm\.", "bn1."),
)
_SCALES = {"half": 2, "full": 4}
_OWN = ("base_model.conv1_5.", "base_model.resnext_layer1.")  # how the names begin that no other network has
_UNUSED = "base_model.conv1_temp."  # a stem that the authors' network owns and never runs


def from_published(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """The authors' weights under our names, or None if these are not theirs.

    The number of segments does not follow from them: it must be given as it was in training, which is logged.
    """
    if not any(key.startswith(_OWN) for key in state_dict):
        return None
    logger.info(
        "weights of TDN's authors: they do not say their number of segments, which decides how the difference branch is "
        "weighted: data.num_segments must be as in their training, 8 or 16; %s* is left out, for nothing uses it",
        _UNUSED,
    )
    used = {key: value for key, value in state_dict.items() if not key.startswith(_UNUSED)}
    return {renamed(key, FROM_PUBLISHED): value for key, value in used.items()}


def published_name(key: str) -> str:
    """The authors' name for one of ours."""
    name = renamed(key, _TO_PUBLISHED)
    return name if name.startswith("new_fc.") else f"base_model.{name}"
