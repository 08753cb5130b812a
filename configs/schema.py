"""The sections and keys of a configuration: their types, defaults, units and what they require of each other.

    config = load_config("configs/ssv2.yaml", overrides=["solver.lr=5e-4", "network.init=false"])

The comment of a field is also its description in configs/schema.json (python -m scripts.config_schema).
"""

from __future__ import annotations

import dataclasses
import itertools
import re
import typing
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Optional

from configs import parse
from configs.parse import (
    ConfigError,
    Filler,
    PathText,
    Ratio,
    did_you_mean,
    nearest,
    parse_ratio,
    require,
    require_between,
    require_positive,
)
from configs.synonyms import SYNONYMS

if typing.TYPE_CHECKING:
    from dotmap import DotMap

__all__ = [
    "CLIP_MEAN", "CLIP_STD", "STYLES", "CheckpointConfig", "Config", "ConfigError", "DataConfig", "LoggingConfig",
    "NetworkConfig", "PyramidConfig", "Ratio", "SolverConfig", "TextConfig", "VisionConfig", "did_you_mean",
    "fill_options", "load_config", "nearest", "parse_ratio", "require_data_paths", "training_only",
]  # fmt: skip

# Mean and standard deviation of the pixels that CLIP was trained on, for models that name none of their own.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

# A RandAugment policy as timm writes it: rand, then letters with a number each.
RAND_AUGMENT_POLICY = re.compile(r"rand(-[a-z]+\d+(\.\d+)?)+")

# Keys of the published files that have no effect here: the published code reads them for models it never builds.
IGNORED_KEYS = frozenset(
    f"network.{key}"
    for key in ("tm", "drop_out", "emb_dropout", "type", "sim_header", "joint_st", "n_emb", "side_dim", "fix_clip",
                "my_fix_clip", "t_ratio")
) | {"solver.epoch_offset"}  # fmt: skip

# Other names of keys.
ALIASES = {"network.method": "network.model"}

MOTIONS = 9  # the classes of data.task: mosi

# How a dataset samples frames; a dataset outside this table needs `data.style`.
STYLES = {
    "kinetics": ("hmdb51", "ucf101", "k400", "k600", "k700", "kinetics", "kinetics400", "kinetics600", "diving48"),
    "something": ("something", "somethingv1", "somethingv2", "something-v1", "something-v2", "ssv1", "ssv2", "sthv1",
                  "sthv2"),
}  # fmt: skip


@dataclass(frozen=True)
class DataConfig:
    """Where the videos are and how a clip is drawn from one. Sizes in pixels, lengths in frames.

    `style`, `flip`, `flip_pairs` and `gray_prob` follow the dataset where they are null.
    """

    dataset: str  # a known name, such as hmdb51 or somethingv2, or a name of your own with data.style
    num_classes: int
    task: Literal["classify", "mosi"] = "classify"  # mosi: nine motions of a crop over one frame of each video
    static_mask: bool = False  # mosi: in training a random rectangle moves alone, and the rest stands still
    reversed_classes: bool = False  # a second class for each of the list's, of its videos backwards
    modality: Literal["RGB", "video"] = "RGB"  # frame folders (rows `path num_frames label`) or files (`path label`)
    num_segments: int = 8  # T, the segments of a clip, one frame each for most models
    seg_length: Optional[int] = None  # frames read at each segment; null: as many as the model reads
    batch_size: int = 16  # videos a process; a training batch holds batch_size * num_sample clips, with mosi * 9
    workers: int = 4  # processes that load videos, in each training process
    image_tmpl: str = "{:06d}.jpg"  # RGB: the file name of a frame by its number
    index_base: Literal[0, 1] = 1  # RGB: the number of a video's first frame
    train_root: Optional[PathText] = None  # folder of the training videos
    val_root: Optional[PathText] = None  # folder of the validation videos
    test_root: Optional[PathText] = None  # null: val_root
    train_list: Optional[PathText] = None  # file of the training videos, one row each
    val_list: Optional[PathText] = None  # file of the validation videos
    test_list: Optional[PathText] = None  # null: val_list
    label_list: Optional[PathText] = None  # csv of the class names with a header line, `id,name`
    input_size: int = 224  # side of the clips that the model sees
    scale_size: Optional[int] = None  # short side before cropping; null: 256 for input_size 224, else input_size
    test_size: Optional[int] = None  # input_size of test_vision.py alone; null: input_size
    test_scale: Optional[int] = None  # scale_size of test_vision.py alone; null: scale_size, at least test_size
    random_shift: bool = True  # false: training takes the frames that validation takes
    augment: bool = True  # false: training takes validation's frames and crop, the same in every epoch
    num_sample: int = 1  # repeated augmentation: draws of each video in a batch
    rand_aug: bool = False  # RandAugment on training clips
    rand_aug_policy: str = "rand-m7-n4-mstd0.5-inc1"  # with rand_aug, as timm writes it
    rand_erase: bool = False  # random erasing with probability 0.25
    dense: bool = False  # sample frames within a span of 128 frames, not from the whole video
    shot: Optional[int] = None  # few-shot: training videos a class
    style: Optional[Literal["kinetics", "something", "tdn", "tada_segment", "tada_interval"]] = None  # frame sampling
    interval: int = 8  # tada_interval: frames, at 30 a second, from one sampled frame to the next
    fps: Optional[float] = None  # tada_interval with RGB: frames a second of the folders; video files state their own
    flip: Optional[bool] = None  # mirror half of the training clips
    flip_pairs: Optional[tuple[tuple[int, int], ...]] = None  # labels that a horizontal flip exchanges
    gray_prob: Optional[float] = None  # share of the training clips that turn grey
    crop: Literal["random_resized", "multi_scale", "random_short_side"] = "random_resized"  # of training clips
    crop_scale: tuple[float, float] = (0.08, 1.0)  # random_resized: share of the area that a crop covers
    crop_scales: tuple[float, ...] = (1.0, 0.875, 0.75, 0.66)  # multi_scale: a crop's sides as shares of the short side
    short_side: tuple[int, int] = (256, 320)  # random_short_side: its range, both ends included
    eval_crop: Literal["clip", "tdn", "tada"] = "clip"  # whose resizing and crops validation and testing take
    mean: Optional[tuple[float, float, float]] = None  # of pixels in 0..1, R G B; null: the model's own
    std: Optional[tuple[float, float, float]] = None  # of pixels in 0..1, R G B; null: the model's own
    on_error: Literal["raise", "skip"] = "raise"  # what a video that cannot be read does
    decoder: Literal["pyav", "decord"] = "pyav"  # of video files; both give the same frames

    def check(self) -> None:
        require_positive(
            self, "data", "num_classes", "seg_length", "batch_size", "input_size", "scale_size", "test_size", "test_scale",
            "num_sample", "shot", "interval", "fps",
        )  # fmt: skip
        require_between(self, "data", 0, 1, "gray_prob")
        require(
            self.num_segments >= 2,
            "data.num_segments",
            f"must be at least 2, not {self.num_segments}: the models compare neighbouring frames",
        )
        require(self.workers >= 0, "data.workers", f"must not be negative, not {self.workers}")
        mean, std = list(self.mean or ()), list(self.std or ())
        scale = "for pixels in 0..1, so those in 0..255 are divided by 255"
        require(
            all(0 <= each <= 1 for each in mean), "data.mean", f"must hold three numbers from 0 to 1, {scale}: {mean}"
        )
        require(
            all(0 < each <= 1 for each in std), "data.std", f"must hold three positive numbers up to 1, {scale}: {std}"
        )
        if self.scale_size is not None:
            require(
                self.scale_size >= self.input_size,
                "data.scale_size",
                f"{self.scale_size} is smaller than data.input_size {self.input_size}",
            )
        if self.test_scale is not None:
            size_key = "test_size" if self.test_size is not None else "input_size"
            require(
                self.test_scale >= getattr(self, size_key),
                "data.test_scale",
                f"{self.test_scale} is smaller than data.{size_key} {getattr(self, size_key)}",
            )
        for pair in self.flip_pairs or ():
            require(
                all(0 <= label < self.num_classes for label in pair),
                "data.flip_pairs",
                f"names a label outside 0..{self.num_classes - 1}: {list(pair)}",
            )
        known = [name for names in STYLES.values() for name in names]
        require(
            self.style is not None or self.dataset in known,
            "data.dataset",
            f"{self.dataset!r} is not a known dataset{did_you_mean(self.dataset, known)}; "
            "for your own data set data.style to kinetics or something, or to a model's own (tdn, tada_segment, tada_interval)",
        )
        self._check_task()
        self._check_sampling()
        self._check_augmentation()
        self._check_crop()
        if self.modality == "RGB":
            self._check_image_template()

    def _check_task(self) -> None:
        _refuse_settings_of_others(self, "data", "task", {"static_mask": "mosi"})
        require(
            not self.reversed_classes or self.num_classes % 2 == 0,
            "data.num_classes",
            f"must be twice the classes of the lists with data.reversed_classes: true, not {self.num_classes}",
        )
        if self.task != "mosi":
            return
        require(
            self.num_classes == MOTIONS, "data.num_classes", f"must be {MOTIONS} with data.task: mosi, one a motion"
        )
        require(
            self.short_side_size > self.input_size,
            "data.scale_size",
            f"must be above data.input_size {self.input_size} with data.task: mosi: the crop moves over that picture",
        )
        unread = ("augment", "num_sample", "dense", "shot", "reversed_classes")
        for key in unread:
            default = getattr(self, key) == getattr(DataConfig, key)
            require(default, f"data.{key}", "has no effect with data.task: mosi")

    def _check_sampling(self) -> None:
        _refuse_settings_of_others(self, "data", "style", {"interval": "tada_interval", "fps": "tada_interval"})
        require(
            not self.dense or self.sampling_style in STYLES,
            "data.dense",
            f"true is another sampling than data.style: {self.style}; set one of the two",
        )
        if self.style == "tada_interval":
            is_rgb = self.modality == "RGB"
            require(
                self.fps is not None or not is_rgb,
                "data.fps",
                "is needed with data.style: tada_interval, as frame folders do not state their frames a second",
            )
            require(
                self.fps is None or is_rgb,
                "data.fps",
                "is for frame folders, but data.modality is video, and video files state their own",
            )

    def _check_augmentation(self) -> None:
        require(
            self.rand_aug or self.rand_aug_policy == DataConfig.rand_aug_policy,
            "data.rand_aug_policy",
            "is given, but data.rand_aug is false, so it would not be read",
        )
        require(
            RAND_AUGMENT_POLICY.fullmatch(self.rand_aug_policy) is not None,
            "data.rand_aug_policy",
            f"{self.rand_aug_policy!r} is not a RandAugment policy such as {DataConfig.rand_aug_policy}",
        )
        if self.augment:
            return
        require(
            self.num_sample == 1,
            "data.num_sample",
            f"{self.num_sample} draws of a video are all the same with data.augment: false",
        )
        for key in ("rand_aug", "rand_erase", "flip", "gray_prob"):
            require(not getattr(self, key), f"data.{key}", "has no effect with data.augment: false")
        for key in ("crop", "crop_scale"):
            default = getattr(self, key) == getattr(DataConfig, key)
            require(default, f"data.{key}", "has no effect with data.augment: false")

    def _check_crop(self) -> None:
        crops = {"crop_scale": "random_resized", "crop_scales": "multi_scale", "short_side": "random_short_side"}
        _refuse_settings_of_others(self, "data", "crop", crops)
        low, high = self.crop_scale
        require(
            0 < low <= high <= 1,
            "data.crop_scale",
            f"must be [low, high] with 0 < low <= high <= 1, not [{low}, {high}]",
        )
        scales = list(self.crop_scales)
        require(
            bool(scales) and scales[0] <= 1 and scales[-1] > 0 and scales == sorted(set(scales), reverse=True),
            "data.crop_scales",
            f"must descend from at most 1 and stay above 0, not {scales}",
        )
        low, high = self.short_side
        require(low <= high, "data.short_side", f"must be [low, high] with low <= high, not [{low}, {high}]")
        require(
            self.crop != "random_short_side" or low >= self.input_size,
            "data.short_side",
            f"{low} is smaller than data.input_size {self.input_size}",
        )

    def _check_image_template(self) -> None:
        try:
            names = {self.image_tmpl.format(number) for number in (1, 2)}
        except (IndexError, KeyError, ValueError) as error:
            raise ConfigError(
                f"data.image_tmpl: {self.image_tmpl!r} does not format a frame number ({error})"
            ) from None
        require(
            len(names) == 2,
            "data.image_tmpl",
            f"{self.image_tmpl!r} has no place for the frame number; write e.g. '{{:06d}}.jpg'",
        )

    def with_pixel_statistics(
        self, mean: Optional[Sequence[float]] = None, std: Optional[Sequence[float]] = None
    ) -> DataConfig:
        """Fill `mean` and `std` where they are null: with a model's own, else with CLIP's."""
        own_mean, own_std = tuple(mean or CLIP_MEAN), tuple(std or CLIP_STD)
        return dataclasses.replace(self, mean=self.mean or own_mean, std=self.std or own_std)

    @property
    def sampling_style(self) -> str:
        """data.style, or the dataset's own, `kinetics` or `something`."""
        return self.style or next(style for style, names in STYLES.items() if self.dataset in names)

    @property
    def listed_classes(self) -> int | None:
        """The number of classes in the lists; None where their labels are not read."""
        if self.task == "mosi":
            return None
        return self.num_classes // 2 if self.reversed_classes else self.num_classes

    @property
    def clips_per_video(self) -> int:
        """The clips that a training batch holds of each of its videos."""
        return MOTIONS if self.task == "mosi" else self.num_sample

    @property
    def short_side_size(self) -> int:
        """data.scale_size, with its default."""
        return self.scale_size or (256 if self.input_size == 224 else self.input_size)

    def for_testing(self) -> DataConfig:
        """The settings with the sizes of testing as `input_size` and `scale_size`; mosi is tested as it is trained."""
        if self.task == "mosi":
            return self
        size = self.test_size or self.input_size
        scale = self.test_scale or max(self.short_side_size, size)
        return dataclasses.replace(self, input_size=size, scale_size=scale, test_size=None, test_scale=None)


@dataclass(frozen=True)
class VisionConfig:
    """A custom CLIP vision tower, for tests and small experiments. Sizes in pixels."""

    width: int  # channels of a token
    layers: int
    heads: int
    patch_size: int
    image_size: int
    mlp_ratio: float = 4.0  # hidden width of the MLPs by width
    quick_gelu: bool = True  # OpenAI's approximation of GELU

    def check(self) -> None:
        require_positive(self, "network.vision", "width", "layers", "heads", "patch_size", "image_size", "mlp_ratio")
        require(
            self.width % self.heads == 0,
            "network.vision.heads",
            f"width {self.width} is not divisible by {self.heads} heads",
        )
        require(
            self.image_size % self.patch_size == 0,
            "network.vision.patch_size",
            f"image_size {self.image_size} is not divisible by {self.patch_size}",
        )


@dataclass(frozen=True)
class PyramidConfig:
    """The side network of td4v_side."""

    n_embs: tuple[int, ...] = (96, 96, 192, 192, 384, 384, 384, 384, 384, 384, 768, 768)  # widths, one a CLIP layer
    mlp_ratio: float = 1.0  # hidden width of the MLPs by width

    def check(self) -> None:
        require(
            len(self.n_embs) > 0 and min(self.n_embs, default=0) > 0,
            "network.pyramid.n_embs",
            "must list one positive width a CLIP layer",
        )
        require_positive(self, "network.pyramid", "mlp_ratio")


@dataclass(frozen=True)
class TextConfig:
    """The text head: what CLIP's text tower reads of a class, and which part of it is trainable."""

    templates: tuple[str, ...] = ("a video of a person {}.",)  # {} is the class name; a class is the mean over these
    # none: the classifier is CLIP's embeddings of the texts. classifier: it starts there. tower: CLIP's text tower too,
    # through which all classes in all templates go in each step: ViT-B/16's saves 0.5 MB a token in float32 (0.7 GB for
    # 101 classes in one template, the longest of 14 tokens), with network.recompute a twentieth of that.
    tuned: Literal["none", "classifier", "tower"] = "none"
    heads: Optional[int] = None  # of the text tower of network.arch: custom; null: its width // 64, as all of OpenAI's

    def check(self) -> None:
        require_positive(self, "network.text", "heads")
        require(len(self.templates) > 0, "network.text.templates", "must list at least one text")
        for template in self.templates:
            require(
                template.count("{}") == 1,
                "network.text.templates",
                f"{template!r} must have one place for the class name, written {{}}",
            )


@dataclass(frozen=True)
class NetworkConfig:
    """Which model. `DA_ratio`, `sample_mode` and `pyramid` describe side-tuning, as in the published files."""

    arch: str = "ViT-B/16"  # OpenAI's name, a ViT of open_clip or timm, or `custom` with vision
    init: bool = True  # load pretrained weights
    weights: Optional[PathText] = None  # a tag or a file; null: clip_pretrain/, else OpenAI's or timm's tag
    model: Optional[str] = None  # a name of models.registry.MODELS; null: td4v_finetune if fine_tuning, else td4v_side
    fine_tuning: bool = False  # the published switch between TD4V's two models
    head: Literal["linear", "text"] = "linear"  # the classifier; text: CLIP's embeddings of the class names
    text: TextConfig = field(default_factory=TextConfig)  # with head: text
    drop_fc: float = 0.0  # dropout before the classifier
    sync_bn: bool = False  # BatchNorm over all processes
    recompute: bool = False  # compute blocks again in backward, do not save activations: less memory, more time
    cache_features: Literal["off", "val", "all"] = "off"  # compute frozen features once and keep them on disk
    DA_ratio: Ratio = Ratio(1 / 6)  # td4v_side: channels of a TD4V module by width
    sample_mode: Literal["FC", "CNN"] = "CNN"  # td4v_side: what reduces the channels of a TD4V module
    vision: Optional[VisionConfig] = None  # with arch: custom
    pyramid: PyramidConfig = field(default_factory=PyramidConfig)
    options: dict[str, Any] = field(default_factory=dict)  # the model's own: the fields of Options in its file

    def check(self) -> None:
        require(0 <= self.drop_fc < 1, "network.drop_fc", f"must lie in [0, 1), not {self.drop_fc:g}")
        require(
            not self.fine_tuning or self.model != "td4v_side",
            "network.fine_tuning",
            "true means td4v_finetune, but network.model is td4v_side; set network.model alone",
        )
        require(
            (self.arch == "custom") == (self.vision is not None),
            "network.vision",
            "goes with network.arch: custom, and custom needs it",
        )
        require(
            self.init or self.weights is None,
            "network.weights",
            "is given, but network.init is false, so it would not be read",
        )
        require(
            self.head == "text" or self.text == TextConfig(),
            "network.text",
            "is given, but network.head is linear, so it would not be read",
        )
        require(
            self.text.heads is None or self.vision is not None,
            "network.text.heads",
            "is only for network.arch: custom: the text tower of a named one has heads of its own",
        )
        require(
            self.vision is None or not self.init or self.weights is not None,
            "network.weights",
            "a custom tower has no public weights: give a file, or set network.init to false",
        )

    @property
    def model_name(self) -> str:
        """The model's name in models.registry.MODELS: `model`, or what the published `fine_tuning` switch means."""
        return self.model or ("td4v_finetune" if self.fine_tuning else "td4v_side")


@dataclass(frozen=True)
class SolverConfig:
    """How it is trained. Learning rates are absolute; `lr_base_batch` scales them."""

    type: Literal["cosine", "step"] = "cosine"  # how the learning rate falls after the warm-up
    epochs: int = 30
    start_epoch: int = 0  # a published key; a resumed run takes its epoch from the checkpoint
    optim: Literal["adamw", "sgd"] = "adamw"
    lr: float = 1e-3  # the highest learning rate
    lr_base_batch: Optional[int] = None  # clips a step that lr is meant for: lr grows in proportion to the real ones
    lr_warmup_step: float = 4.0  # epochs of linear warm-up
    lr_warmup_start: float = 0.0  # learning rate at the start of the warm-up; lr_base_batch scales it as lr
    lr_final: float = 0.0  # cosine: learning rate at the end; lr_base_batch scales it as lr
    cosine_after_warmup: bool = True  # false: the cosine spans all epochs, and the warm-up rises to its value there
    milestones: tuple[float, ...] = ()  # step: epochs at which the learning rate is multiplied by gamma
    gamma: float = 0.1  # step: factor of the learning rate at each milestone
    weight_decay: float = 0.15
    decay_norms: bool = True  # false: no weight decay for norms, biases and scalars; the paper decays all alike
    betas: tuple[float, float] = (0.9, 0.999)  # adamw
    eps: float = 1e-8  # adamw
    momentum: float = 0.9  # sgd
    nesterov: bool = False  # sgd
    loss_type: Literal["CE"] = "CE"  # a published key: cross-entropy
    evaluate: bool = False  # only validate the weights of pretrain or resume
    clip_ratio: float = 1.0  # learning-rate factor of all trainable parameters but the classifier's
    clip_grad: Optional[float] = None  # largest gradient norm
    grad_accumulation_steps: int = 1  # batches averaged in one optimizer step
    mixup: bool = False  # mixup and cutmix, by their alphas
    mixup_alpha: float = 0.8
    cutmix_alpha: float = 1.0
    smoothing: float = 0.1  # label smoothing
    layer_decay: float = 1.0  # learning-rate factor from each layer to the one before it
    ema_decay: Optional[float] = None  # validate and save an exponential moving average of the trainable weights
    early_stop: Optional[int] = None  # stop after so many validations without a better top-1
    max_bad_steps: int = 10  # stop after so many steps in a row whose gradients are not finite; fewer are skipped
    compile: bool = False  # torch.compile: a slow start, then faster; sums in another order
    tf32: bool = False  # float32 matrix products on a GPU with 10 bits of mantissa: faster, less accurate
    precision: Literal["amp", "fp16", "bf16", "fp32"] = "amp"  # amp: fp16 with loss scaling on a GPU, fp32 on a CPU

    def check(self) -> None:
        require_positive(self, "solver", "epochs", "grad_accumulation_steps", "lr", "clip_ratio", "clip_grad", "eps",
                         "lr_base_batch", "early_stop", "max_bad_steps")  # fmt: skip
        require_between(self, "solver", 0, 1, "smoothing", "momentum")
        for key in ("weight_decay", "mixup_alpha", "cutmix_alpha", "lr_warmup_step", "lr_warmup_start", "lr_final"):
            require(getattr(self, key) >= 0, f"solver.{key}", f"must not be negative, not {getattr(self, key)}")
        require(
            all(0 <= beta < 1 for beta in self.betas), "solver.betas", f"must lie in [0, 1), not {list(self.betas)}"
        )
        require(
            self.start_epoch == 0, "solver.start_epoch", "must be 0: a resumed run takes its epoch from the checkpoint"
        )
        for key in ("layer_decay", "gamma"):
            value = getattr(self, key)
            require(0 < value <= 1, f"solver.{key}", f"must lie above 0 and up to 1, not {value}")
        require(
            self.ema_decay is None or 0 < self.ema_decay < 1,
            "solver.ema_decay",
            f"must lie between 0 and 1, not {self.ema_decay}",
        )
        require(self.smoothing < 1, "solver.smoothing", "must be below 1")
        require(
            not self.mixup or self.mixup_alpha > 0 or self.cutmix_alpha > 0,
            "solver.mixup",
            "needs mixup_alpha or cutmix_alpha above 0",
        )
        require(
            not self.nesterov or (self.optim == "sgd" and self.momentum > 0),
            "solver.nesterov",
            "needs solver.optim: sgd and solver.momentum above 0",
        )
        self._check_schedule()

    def _check_schedule(self) -> None:
        types = {"milestones": "step", "gamma": "step", "lr_final": "cosine", "cosine_after_warmup": "cosine"}
        _refuse_settings_of_others(self, "solver", "type", types)
        epochs = list(self.milestones)
        require(self.type != "step" or bool(epochs), "solver.milestones", "is needed by solver.type: step")
        require(
            all(one < other for one, other in itertools.pairwise([0, *epochs, self.epochs])),
            "solver.milestones",
            f"must ascend above 0 and below solver.epochs {self.epochs}, not {epochs}",
        )
        for key in ("lr_warmup_start", "lr_final"):
            value = getattr(self, key)
            require(value <= self.lr, f"solver.{key}", f"{value:g} is above solver.lr {self.lr:g}")


@dataclass(frozen=True)
class LoggingConfig:
    """What is logged, how often, and where."""

    print_freq: int = 20  # steps between two lines of the log
    eval_freq: int = 1  # epochs between two validations
    skip_epoch: tuple[int, ...] = ()  # epochs, counted from 0, that are not validated; the last one always is
    output_dir: PathText = PathText("exp")  # runs go to output_dir/dataset/arch
    clips: int = 2  # input clips shown in TensorBoard at the start

    def check(self) -> None:
        require_positive(self, "logging", "print_freq", "eval_freq")
        require(self.clips >= 0, "logging.clips", "must not be negative")
        require(min(self.skip_epoch, default=0) >= 0, "logging.skip_epoch", "counts epochs from 0")


@dataclass(frozen=True)
class CheckpointConfig:
    """When the run is saved besides the end of each epoch, and what is kept."""

    every_steps: Optional[int] = None  # steps between two saves
    every_minutes: Optional[float] = 10.0  # minutes between two saves, at the end of a step; null: never
    keep: int = 2  # checkpoints to resume from: last_model.pt and those before it
    full: bool = False  # save the frozen weights too, instead of their source and hash

    def check(self) -> None:
        require_positive(self, "checkpoint", "every_steps", "every_minutes", "keep")


@dataclass(frozen=True)
class Config:
    """A complete configuration: defaults filled in, overrides applied, everything checked."""

    data: DataConfig
    network: NetworkConfig = field(default_factory=NetworkConfig)
    solver: SolverConfig = field(default_factory=SolverConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    resume: Optional[PathText] = None  # a checkpoint: continue that run
    pretrain: Optional[PathText] = None  # a checkpoint: start from its weights
    pretrain_head: Literal["keep", "drop"] = "keep"  # drop: a new classifier instead of the checkpoint's
    seed: int = 1024

    def check(self) -> None:
        require(self.seed >= 0, "seed", f"must not be negative, not {self.seed}")
        require(
            not (self.resume and self.pretrain),
            "pretrain",
            "and resume are both given: resume already holds the weights",
        )
        require(
            self.solver.lr_warmup_step <= self.solver.epochs,
            "solver.lr_warmup_step",
            f"{self.solver.lr_warmup_step:g} epochs of warm-up do not fit in solver.epochs {self.solver.epochs}",
        )
        require(
            not self.solver.evaluate or self.pretrain is not None or self.resume is not None,
            "solver.evaluate",
            "needs pretrain or resume: there are no weights to evaluate",
        )
        clips = self.data.batch_size * self.data.clips_per_video
        require(
            not self.solver.mixup or clips % 2 == 0,
            "solver.mixup",
            f"mixes pairs of clips and needs an even batch: data.batch_size * data.num_sample is {clips}",
        )
        if self.network.cache_features == "all":
            require(
                not self.data.augment,
                "network.cache_features",
                "all keeps one clip a video, but data.augment: true draws new ones in every epoch; "
                "set it to false, or this to val",
            )
            require(
                not self.solver.mixup,
                "network.cache_features",
                "all trains on features, and solver.mixup mixes pixels; turn one of them off",
            )
        if self.network.vision is not None:
            size = self.network.vision.image_size
            require(
                size == self.data.input_size,
                "network.vision.image_size",
                f"{size} differs from data.input_size {self.data.input_size}, for which the tower is built "
                "(positions in its weights are interpolated)",
            )

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain values, ready for YAML, JSON and a checkpoint."""
        return parse.plain(dataclasses.asdict(self))

    def to_dotmap(self) -> DotMap:
        """The configuration for scripts that read `config.data.num_segments`; an unknown key is an AttributeError."""
        from dotmap import DotMap

        return DotMap(self.to_dict(), _dynamic=False)


def load_config(source: str | Path | Mapping[str, Any] | Config, overrides: Sequence[str] = ()) -> Config:
    """Read a configuration of the published layout.

    Args:
        source: a YAML file, which may build on another (`base: other.yaml`), or a Config, or a mapping of sections, such
            as a DotMap or what `Config.to_dict` returns. A mapping has no `base`: there is no folder to find it from.
        overrides: `a.b=value` strings; the value is read as YAML, applied after the file, later ones win. A list may
            be written without brackets: `solver.betas=0.9,0.95`.

    Returns:
        The complete, checked configuration.

    Raises:
        ConfigError: a missing file, broken YAML, a duplicate, unknown or wrongly typed key, settings that exclude each
            other. The message is one sentence with the file, the line, if there is one, and the dotted key.
    """
    places: dict[str, str] = {}
    if isinstance(source, (Config, Mapping)):
        values, name = parse.plain(source.to_dict() if isinstance(source, Config) else source), ""
    elif not isinstance(source, (str, Path)):
        raise ConfigError(f"a configuration is read from a path, a mapping or a Config, not from {source!r}")
    else:
        values, places = parse.read_yaml(Path(source), ALIASES)
        name = str(source)
    try:
        if parse.BASE in values:
            raise ConfigError("base: only a file can build on another; load that file and give the rest as overrides")
        parse.rename_aliases(values, ALIASES)
        kinds = dict(parse.all_fields(Config))
        for override in overrides:
            key = parse.apply_override(values, override, ALIASES)
            places[key] = f"{name} with --set {override}".strip()
            if not override.partition("=")[2].strip():
                kind = kinds.get(key)
                may_be_empty = parse.is_optional(kind) or typing.get_origin(kind) is tuple
                require(may_be_empty, key, "has no value: write one, or leave the override out")
        filler = Filler(Config, ignored=IGNORED_KEYS, synonyms=SYNONYMS)
        config = filler.fill(values)
    except ConfigError as error:
        raise parse.locate(error, places, name) from None
    if filler.found_ignored:
        keys = ", ".join(sorted(filler.found_ignored))
        warnings.warn(f"these published keys have no effect: {keys}", stacklevel=2)
    return config


def training_only(default: Any) -> Any:
    """The default of an option that changes nothing after training, such as a dropout."""
    return field(default=default, metadata={"training_only": True})


def fill_options(cls: type, values: dict[str, Any], path: str) -> Any:
    """Fill a model's dataclass of options with the same checks as the rest; `path` is its dotted key."""
    return Filler(cls, path).fill(values)


def require_data_paths(config: Config, splits: Sequence[Literal["train", "val", "test"]], source: str | Path) -> None:
    """Make sure that the lists and roots of some splits are set. The test split falls back to validation's.

    Args:
        source: where the configuration is from, for the message.

    Raises:
        ConfigError: names all that are not set.
    """
    missing = []
    for what in ("list", "root"):
        for split in splits:
            keys = [f"{split}_{what}", *([f"val_{what}"] if split == "test" else [])]
            if not any(getattr(config.data, key) for key in keys):
                missing.append(f"data.{keys[-1]}")
    if missing:
        verb, them = ("are", "them") if len(missing) > 1 else ("is", "it")
        write = f"write {them} into the file, or " if Path(source).suffix in (".yaml", ".yml") else ""
        raise ConfigError(
            f"{source}: {', '.join(missing)} {verb} not set; {write}set {them} by --set {missing[0]}=PATH"
        )


def _refuse_settings_of_others(section: Any, path: str, switch: str, owners: Mapping[str, str]) -> None:
    """Refuse fields whose value is not the default and which another choice of `switch` reads, not the one made."""
    chosen = getattr(section, switch)
    for key, owner in owners.items():
        require(
            chosen == owner or getattr(section, key) == getattr(type(section), key),
            f"{path}.{key}",
            f"is for {path}.{switch}: {owner}, but {path}.{switch} is {chosen}, so it would not be read",
        )
