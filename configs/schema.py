"""What may stand in a configuration file: typed, frozen dataclasses and the one function that fills them.

Lives here: the sections of the published YAML layout (data, network, solver, logging, and checkpoint), their types,
defaults and units; reading a YAML with overrides; every error a configuration can have on its own.
Does not live here: anything that needs a model, a dataset or torch. This file imports nothing of the project.

    config = load_config("configs/ssv2.yaml", overrides=["solver.lr=5e-4", "network.init=false"])
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import re
import types
import typing
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, NewType, Optional

import yaml

# Pixels' mean and standard deviation as CLIP was trained with: what a model reads that names none of its own.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

# A RandAugment policy in timm's words: rand, then letters with a number each.
RAND_AUGMENT_POLICY = re.compile(r"rand(-[a-z]+\d+(\.\d+)?)+")

Ratio = NewType("Ratio", float)  # a positive number, written as a float or as a fraction string such as "1/6"

# Keys of the published files that nothing reads (the published code reads them for models it never builds).
DEAD_KEYS = frozenset(
    {"network.tm", "network.drop_out", "network.emb_dropout", "network.type", "network.sim_header", "network.joint_st",
     "network.n_emb", "network.side_dim", "network.fix_clip", "network.my_fix_clip", "network.t_ratio",
     "solver.epoch_offset"}
)  # fmt: skip

# Former and published names of keys.
ALIASES = {"network.method": "network.model"}

# The traits of a dataset that change sampling and augmentation; a name outside this table needs `data.style`.
STYLES = {
    "kinetics": ("hmdb51", "ucf101", "k400", "k600", "k700", "kinetics", "kinetics400", "kinetics600", "diving48"),
    "something": ("something", "somethingv1", "somethingv2", "something-v1", "something-v2", "ssv1", "ssv2", "sthv1",
                  "sthv2"),
}  # fmt: skip


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the file, the dotted key and, if any, the nearest one."""


@dataclass(frozen=True)
class DataConfig:
    """Where the videos are and how a clip is drawn from one. Sizes in pixels, lengths in frames.

    `modality` RGB reads frame folders (rows `path num_frames label`), `video` reads files (rows `path label`).
    `style`, `flip`, `flip_pairs` and `gray_prob` follow the dataset where they are null.
    """

    dataset: str
    num_classes: int
    modality: Literal["RGB", "video"] = "RGB"
    num_segments: int = 8  # T, frames a clip
    seg_length: Optional[int] = None  # frames read at each of the T segments; null: as many as the model reads
    batch_size: int = 16  # videos a process; a training batch holds batch_size * num_sample clips
    workers: int = 4
    image_tmpl: str = "{:06d}.jpg"
    train_root: Optional[str] = None
    val_root: Optional[str] = None
    test_root: Optional[str] = None  # null: val_root
    train_list: Optional[str] = None
    val_list: Optional[str] = None
    test_list: Optional[str] = None  # null: val_list
    label_list: Optional[str] = None  # csv with a header line, `id,name`
    input_size: int = 224
    scale_size: Optional[int] = None  # short side before cropping; null: 256 for input_size 224, else input_size
    random_shift: bool = True  # false: training takes the validation's frames
    augment: bool = True  # false: training takes the validation's frames and crop, the same in every epoch
    num_sample: int = 1  # repeated augmentation: draws of each video in a batch
    rand_aug: bool = False
    rand_aug_policy: str = "rand-m7-n4-mstd0.5-inc1"  # with rand_aug, in timm's words
    rand_erase: bool = False
    dense: bool = False
    shot: Optional[int] = None  # few-shot: training videos a class
    style: Optional[Literal["kinetics", "something"]] = None
    flip: Optional[bool] = None
    flip_pairs: Optional[tuple[tuple[int, int], ...]] = None  # labels that a horizontal flip exchanges
    gray_prob: Optional[float] = None
    crop: Literal["random_resized", "multi_scale", "random_short_side"] = "random_resized"  # of training clips
    crop_scale: tuple[float, float] = (0.08, 1.0)  # random_resized: share of the area that a crop covers
    crop_scales: tuple[float, ...] = (
        1.0,
        0.875,
        0.75,
        0.66,
    )  # multi_scale: a crop's sides, as shares of the short side
    short_side: tuple[int, int] = (256, 320)  # random_short_side: its range in pixels, both ends included
    mean: Optional[tuple[float, float, float]] = None  # of pixels in 0..1, R G B; null: the model's own
    std: Optional[tuple[float, float, float]] = None  # null: the model's own
    on_error: Literal["raise", "skip"] = "raise"
    decoder: Literal["pyav", "decord"] = "pyav"  # of video files; both give the same frames

    def check(self) -> None:
        _positive(
            self, "data", "num_classes", "batch_size", "input_size", "scale_size", "num_sample", "shot", "seg_length"
        )
        _within(self, "data", 0, 1, "gray_prob")
        _require(
            self.num_segments >= 2,
            "data.num_segments",
            f"must be at least 2, not {self.num_segments}: TD4V takes differences of neighbouring frames",
        )
        _require(self.workers >= 0, "data.workers", f"must not be negative, not {self.workers}")
        self._check_crop()
        _require(
            self.rand_aug or self.rand_aug_policy == DataConfig.rand_aug_policy,
            "data.rand_aug_policy",
            "is given, but data.rand_aug is false, so it would not be read",
        )
        _require(
            RAND_AUGMENT_POLICY.fullmatch(self.rand_aug_policy) is not None,
            "data.rand_aug_policy",
            f"{self.rand_aug_policy!r} is not a RandAugment policy such as {DataConfig.rand_aug_policy}",
        )
        _require(all(value > 0 for value in self.std or ()), "data.std", "must hold three positive numbers")
        if self.scale_size is not None:
            _require(
                self.scale_size >= self.input_size,
                "data.scale_size",
                f"{self.scale_size} is smaller than data.input_size {self.input_size}",
            )
        if not self.augment:
            _require(
                self.num_sample == 1,
                "data.num_sample",
                f"{self.num_sample} draws of a video are all the same with data.augment: false",
            )
            for key in ("rand_aug", "rand_erase", "flip", "gray_prob"):
                _require(not getattr(self, key), f"data.{key}", "asks for what data.augment: false leaves out")
            _require(
                tuple(self.crop_scale) == DataConfig.crop_scale,
                "data.crop_scale",
                "asks for what data.augment: false leaves out",
            )
            _require(
                self.crop == DataConfig.crop, "data.crop", f"{self.crop} asks for what data.augment: false leaves out"
            )
        for pair in self.flip_pairs or ():
            _require(
                all(0 <= label < self.num_classes for label in pair),
                "data.flip_pairs",
                f"names a label outside 0..{self.num_classes - 1}: {list(pair)}",
            )
        if self.modality == "RGB":
            try:
                names = {self.image_tmpl.format(number) for number in (1, 2)}
            except (IndexError, KeyError, ValueError) as error:
                raise ConfigError(
                    f"data.image_tmpl: {self.image_tmpl!r} does not format a frame number ({error})"
                ) from None
            _require(
                len(names) == 2,
                "data.image_tmpl",
                f"{self.image_tmpl!r} has no place for the frame number; write e.g. '{{:06d}}.jpg'",
            )
        known = [name for names in STYLES.values() for name in names]
        if self.style is None and self.dataset not in known:
            raise ConfigError(
                f"data.dataset: {self.dataset!r} is not a known dataset{_hint(self.dataset, known)}; for your own data set data.style to kinetics or something"
            )

    def _check_crop(self) -> None:
        """What the training crops need; a setting of another crop is refused."""
        for key, crop in (
            ("crop_scale", "random_resized"),
            ("crop_scales", "multi_scale"),
            ("short_side", "random_short_side"),
        ):
            _require(
                self.crop == crop or tuple(getattr(self, key)) == getattr(DataConfig, key),
                f"data.{key}",
                f"is of data.crop: {crop}, but data.crop is {self.crop}",
            )
        low, high = self.crop_scale
        _require(
            0 < low <= high <= 1,
            "data.crop_scale",
            f"must be [low, high] with 0 < low <= high <= 1, not [{low}, {high}]",
        )
        scales = self.crop_scales
        _require(
            bool(scales)
            and 1 >= scales[0]
            and scales[-1] > 0
            and all(one > next_one for one, next_one in itertools.pairwise(scales)),
            "data.crop_scales",
            f"must descend from at most 1 and stay above 0, not {list(scales)}",
        )
        low, high = self.short_side
        _require(low <= high, "data.short_side", f"must be [low, high] with low <= high, not [{low}, {high}]")
        _require(
            self.crop != "random_short_side" or low >= self.input_size,
            "data.short_side",
            f"{low} is smaller than data.input_size {self.input_size}",
        )

    def with_pixel_statistics(
        self, mean: Optional[Sequence[float]] = None, std: Optional[Sequence[float]] = None
    ) -> DataConfig:
        """Fill `mean` and `std` where they are null: with a model's own, else with CLIP's."""
        own_mean, own_std = tuple(mean or CLIP_MEAN), tuple(std or CLIP_STD)
        return dataclasses.replace(self, mean=self.mean or own_mean, std=self.std or own_std)

    @property
    def sampling_style(self) -> str:
        """`kinetics` or `something`: data.style, or the dataset's own."""
        return self.style or next(style for style, names in STYLES.items() if self.dataset in names)


@dataclass(frozen=True)
class VisionConfig:
    """A custom CLIP vision tower, for tests and small experiments. `patch_size` and `image_size` in pixels."""

    width: int
    layers: int
    heads: int
    patch_size: int
    image_size: int
    mlp_ratio: float = 4.0
    quick_gelu: bool = True

    def check(self) -> None:
        _positive(self, "network.vision", "width", "layers", "heads", "patch_size", "image_size", "mlp_ratio")
        _require(
            self.width % self.heads == 0,
            "network.vision.heads",
            f"width {self.width} is not divisible by {self.heads} heads",
        )
        _require(
            self.image_size % self.patch_size == 0,
            "network.vision.patch_size",
            f"image_size {self.image_size} is not divisible by {self.patch_size}",
        )


@dataclass(frozen=True)
class PyramidConfig:
    """Widths of the side network, one a CLIP layer, and the hidden share of its MLPs."""

    n_embs: tuple[int, ...] = (96, 96, 192, 192, 384, 384, 384, 384, 384, 384, 768, 768)
    mlp_ratio: float = 1.0

    def check(self) -> None:
        _require(
            len(self.n_embs) > 0 and min(self.n_embs, default=0) > 0,
            "network.pyramid.n_embs",
            "must list one positive width a CLIP layer",
        )
        _positive(self, "network.pyramid", "mlp_ratio")


@dataclass(frozen=True)
class TextConfig:
    """The text head: what CLIP is told of a class, and what of it is tuned. A class's name goes where {} stands."""

    templates: tuple[str, ...] = ("a video of a person {}.",)  # the class is the mean over these
    # none: the classifier is CLIP's embeddings of the texts; classifier: it starts there; tower: CLIP's text tower too,
    # through which all classes in all templates go in each step: ViT-B/16's keeps 0.5 MB a token in float32 (0.7 GB for
    # 101 classes in one template, the longest of 14 tokens), with network.recompute a twentieth of that
    tuned: Literal["none", "classifier", "tower"] = "none"
    heads: Optional[int] = None  # of the text tower of network.arch: custom; null: its width // 64, as all of OpenAI's

    def check(self) -> None:
        _positive(self, "network.text", "heads")
        _require(len(self.templates) > 0, "network.text.templates", "must list at least one text")
        for template in self.templates:
            _require(
                template.count("{}") == 1,
                "network.text.templates",
                f"{template!r} must have one place for the class's name, written {{}}",
            )


@dataclass(frozen=True)
class NetworkConfig:
    """Which model. `DA_ratio`, `sample_mode` and `pyramid` describe side-tuning, as in the published files.

    `options` holds what is a method's own: the keys are the fields of the dataclass Options in the method's file, and
    are checked when the model is built.
    """

    arch: str = "ViT-B/16"  # OpenAI's name, a ViT of open_clip or timm, or `custom` with vision
    init: bool = True  # load CLIP's weights
    weights: Optional[str] = None  # a tag or a file; null: clip_pretrain/, else OpenAI's or timm's tag
    model: Optional[str] = None  # null: td4v_finetune if fine_tuning, else td4v_side
    fine_tuning: bool = False
    head: Literal["linear", "text"] = "linear"  # the classifier; text: CLIP's embeddings of the class names
    text: TextConfig = field(default_factory=TextConfig)  # with head: text
    drop_fc: float = 0.0  # dropout before the classifier
    sync_bn: bool = False
    recompute: bool = False  # compute blocks again in backward, not keep their activations: less memory, more time
    cache_features: Literal["off", "val", "all"] = "off"  # frozen features are computed once and kept on disk
    DA_ratio: Ratio = Ratio(1 / 6)
    sample_mode: Literal["FC", "CNN"] = "CNN"
    vision: Optional[VisionConfig] = None
    pyramid: PyramidConfig = field(default_factory=PyramidConfig)
    options: dict[str, Any] = field(default_factory=dict)

    def check(self) -> None:
        _within(self, "network", 0, 1, "drop_fc")
        _require(
            (self.arch == "custom") == (self.vision is not None),
            "network.vision",
            "goes with network.arch: custom, and custom needs it",
        )
        _require(
            self.init or self.weights is None,
            "network.weights",
            "is given, but network.init is false, so it would not be read",
        )
        _require(
            self.head == "text" or self.text == TextConfig(),
            "network.text",
            "is given, but network.head is linear, so it would not be read",
        )
        _require(
            self.text.heads is None or self.vision is not None,
            "network.text.heads",
            "is for network.arch: custom alone: the text tower of a named one has heads of its own",
        )
        if self.vision is not None:
            _require(
                not self.init or self.weights is not None,
                "network.weights",
                "a custom tower has no public weights: give a file, or set network.init to false",
            )

    @property
    def model_name(self) -> str:
        """The model's name in the MODELS table: `model`, or what the published `fine_tuning` switch means."""
        return self.model or ("td4v_finetune" if self.fine_tuning else "td4v_side")


@dataclass(frozen=True)
class SolverConfig:
    """How it is trained. Learning rates are for one step as given, unless `lr_base_batch` scales them."""

    type: Literal["cosine", "step"] = "cosine"  # how the learning rate falls
    epochs: int = 30
    start_epoch: int = 0
    optim: Literal["adamw", "sgd"] = "adamw"
    lr: float = 1e-3
    lr_base_batch: Optional[int] = None  # clips a step that lr is meant for: lr grows in proportion to the real ones
    lr_warmup_step: float = 4.0  # epochs of linear warm-up from lr_warmup_start
    lr_warmup_start: float = 0.0  # the learning rate at step 0
    lr_final: float = 0.0  # cosine: the learning rate after the last step
    cosine_after_warmup: bool = True  # false: the cosine spans all epochs, and the warm-up rises to its value there
    milestones: tuple[float, ...] = ()  # step: epochs after which the learning rate is multiplied by gamma
    gamma: float = 0.1
    weight_decay: float = 0.15
    decay_norms: bool = True  # false: no weight decay for norms, biases and scalars; the paper decays all alike
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    momentum: float = 0.9  # sgd only
    nesterov: bool = False  # sgd only
    loss_type: Literal["CE"] = "CE"
    evaluate: bool = False  # only validate what pretrain or resume holds
    clip_ratio: float = 1.0  # learning-rate factor of everything tuned but the classifier
    clip_grad: Optional[float] = None  # largest gradient norm
    grad_accumulation_steps: int = 1
    mixup: bool = False
    mixup_alpha: float = 0.8
    cutmix_alpha: float = 1.0
    smoothing: float = 0.1
    layer_decay: float = 1.0  # learning-rate factor from each layer to the one before it
    ema_decay: Optional[float] = None  # validate and keep an exponential moving average of the tuned weights
    early_stop: Optional[int] = None  # end after so many validations without a better top-1
    max_bad_steps: int = 10  # end after so many steps in a row whose gradients are not finite; fewer are left out
    compile: bool = False  # torch.compile: faster after a slow start, sums in another order
    tf32: bool = False  # float32 matrix products on a GPU with 10 bits of mantissa: faster, less accurate
    precision: Literal["amp", "fp16", "bf16", "fp32"] = "amp"  # amp: fp16 with loss scaling on a GPU, fp32 on a CPU

    def check(self) -> None:
        _positive(self, "solver", "epochs", "grad_accumulation_steps", "lr", "clip_ratio", "clip_grad", "eps",
                  "lr_base_batch", "early_stop", "max_bad_steps")  # fmt: skip
        _within(self, "solver", 0, 1, "smoothing", "momentum")
        for key in ("lr_warmup_step", "lr_warmup_start", "lr_final", "weight_decay", "mixup_alpha", "cutmix_alpha"):
            _require(getattr(self, key) >= 0, f"solver.{key}", f"must not be negative, not {getattr(self, key)}")
        _require(
            all(0 <= beta < 1 for beta in self.betas), "solver.betas", f"must lie in [0, 1), not {list(self.betas)}"
        )
        _require(
            self.start_epoch == 0, "solver.start_epoch", "must be 0: a resumed run takes its epoch from the checkpoint"
        )
        _require(
            0 < self.layer_decay <= 1, "solver.layer_decay", f"must lie above 0 and up to 1, not {self.layer_decay}"
        )
        _require(
            self.ema_decay is None or 0 < self.ema_decay < 1,
            "solver.ema_decay",
            f"must lie between 0 and 1, not {self.ema_decay}",
        )
        _require(self.smoothing < 1, "solver.smoothing", "must be below 1")
        self._check_schedule()
        _require(
            not self.nesterov or (self.optim == "sgd" and self.momentum > 0),
            "solver.nesterov",
            "needs solver.optim: sgd and solver.momentum above 0",
        )
        _require(
            not self.mixup or self.mixup_alpha > 0 or self.cutmix_alpha > 0,
            "solver.mixup",
            "needs mixup_alpha or cutmix_alpha above 0",
        )

    def _check_schedule(self) -> None:
        """What the learning rate's course needs; a setting of another course is refused."""
        for key, course in (
            ("milestones", "step"),
            ("gamma", "step"),
            ("lr_final", "cosine"),
            ("cosine_after_warmup", "cosine"),
        ):
            _require(
                self.type == course or getattr(self, key) == getattr(SolverConfig, key),
                f"solver.{key}",
                f"is of solver.type: {course}, but solver.type is {self.type}",
            )
        epochs = list(self.milestones)
        _require(self.type != "step" or bool(epochs), "solver.milestones", "is needed by solver.type: step")
        _require(
            all(one < next_one for one, next_one in itertools.pairwise([0, *epochs, self.epochs])),
            "solver.milestones",
            f"must ascend above 0 and below solver.epochs {self.epochs}, not {epochs}",
        )
        _require(0 < self.gamma <= 1, "solver.gamma", f"must lie above 0 and up to 1, not {self.gamma}")
        for key in ("lr_warmup_start", "lr_final"):
            value = getattr(self, key)
            _require(value <= self.lr, f"solver.{key}", f"{value} is above solver.lr {self.lr}")


@dataclass(frozen=True)
class LoggingConfig:
    """What is written, how often (print_freq in steps, eval_freq in epochs), and where."""

    print_freq: int = 20
    eval_freq: int = 1
    skip_epoch: tuple[int, ...] = ()  # epochs, counted from 0, that are not validated; the last one always is
    output_dir: str = "exp"
    clips: int = 2  # input clips shown in TensorBoard at the start

    def check(self) -> None:
        _positive(self, "logging", "print_freq", "eval_freq")
        _require(self.clips >= 0, "logging.clips", "must not be negative")


@dataclass(frozen=True)
class CheckpointConfig:
    """When the run is saved besides the end of each epoch, and what stays.

    The clock's saves are no other than a step's.
    """

    every_steps: Optional[int] = None
    every_minutes: Optional[float] = 10.0
    keep: int = 2  # checkpoints to go on from: last_model.pt and those before it
    full: bool = False  # hold the frozen weights too, instead of where they come from and their hash

    def check(self) -> None:
        _positive(self, "checkpoint", "every_steps", "every_minutes", "keep")


@dataclass(frozen=True)
class Config:
    """A whole configuration, as resolved: defaults filled, overrides applied, everything checked."""

    data: DataConfig
    network: NetworkConfig = field(default_factory=NetworkConfig)
    solver: SolverConfig = field(default_factory=SolverConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    resume: Optional[str] = None  # a checkpoint: continue that run
    pretrain: Optional[str] = None  # a checkpoint: start from its weights
    pretrain_head: Literal["keep", "drop"] = "keep"  # drop: leave out the checkpoint's classifier, start a new one
    seed: int = 1024

    def check(self) -> None:
        _require(self.seed >= 0, "seed", f"must not be negative, not {self.seed}")
        _require(
            not (self.resume and self.pretrain),
            "pretrain",
            "and resume are both given: resume already holds the weights",
        )
        _require(
            self.solver.lr_warmup_step <= self.solver.epochs,
            "solver.lr_warmup_step",
            f"{self.solver.lr_warmup_step:g} epochs of warm-up do not fit in solver.epochs {self.solver.epochs}",
        )
        _require(
            not self.solver.evaluate or self.pretrain is not None or self.resume is not None,
            "solver.evaluate",
            "needs pretrain or resume: there are no weights to evaluate",
        )
        clips = self.data.batch_size * self.data.num_sample
        _require(
            not self.solver.mixup or clips % 2 == 0,
            "solver.mixup",
            f"mixes pairs of clips and needs an even batch: data.batch_size * data.num_sample is {clips}",
        )
        if self.network.cache_features == "all":
            _require(
                not self.data.augment,
                "network.cache_features",
                "all keeps one clip a video, but data.augment: true draws new ones in every epoch; set it to false, or this to val",
            )
            _require(
                not self.solver.mixup,
                "network.cache_features",
                "all gives features in training, and solver.mixup mixes pixels; set one of them to off or false",
            )
        if self.network.vision is not None:
            size = self.network.vision.image_size
            _require(
                size == self.data.input_size,
                "network.vision.image_size",
                f"{size} differs from data.input_size {self.data.input_size}, for which the tower is built (positions in its weights are interpolated)",
            )

    def to_dict(self) -> dict[str, Any]:
        """The resolved configuration as plain values, fit for YAML, JSON and a checkpoint."""
        return _plain(dataclasses.asdict(self))


def load_config(path: str | Path, overrides: typing.Sequence[str] = ()) -> Config:
    """Read a YAML file of the published layout.

    Args:
        path: the file.
        overrides: `a.b=value` strings; the value is read as YAML, applied after the file, later ones win.

    Returns:
        The resolved, checked configuration.

    Raises:
        ConfigError: missing file, broken YAML, duplicate, unknown or wrongly typed key, impossible combination. The
            message is one sentence with the file, the line where there is one, and the dotted key.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path}: cannot read this configuration ({getattr(error, 'strerror', None) or error})"
        ) from None
    lines: dict[str, int] = {}
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        _note_lines(node, "", lines)
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise ConfigError(
            f"{path}{f', line {mark.line + 1}' if mark else ''}: not valid YAML ({getattr(error, 'problem', error)})"
        ) from None
    except _DuplicateKey as error:
        raise ConfigError(f"{path}, line {error.line}: {error.key} is given twice") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: must hold the sections data, network, solver and logging")
    for override in overrides:
        _apply_override(values, override)
        lines.pop(override.split("=", 1)[0].strip(), None)
    try:
        return config_from_dict(values)
    except ConfigError as error:
        key = str(error).split(":", 1)[0]
        raise ConfigError(f"{path}{f', line {lines[key]}' if key in lines else ''}: {error}") from None


def config_from_dict(values: dict[str, Any]) -> Config:
    """Fill a Config from nested plain values, as `Config.to_dict` writes them. Raises ConfigError."""
    dead: list[str] = []
    config = _fill(Config, values, "", dead)
    if dead:
        warnings.warn(f"these published keys have no effect: {', '.join(sorted(dead))}", stacklevel=3)
    return config


# What may change when a run is resumed: where things are, how fast, how much is told; `solver.epochs` warns.
_FREE_ON_RESUME = ("resume", "pretrain", "logging.", "checkpoint.", "data.workers", "data.on_error", "network.init", "network.weights",
                   "data.train_", "data.val_", "data.test_", "data.label_list", "solver.evaluate",
                   "solver.max_bad_steps", "solver.early_stop")  # fmt: skip


# Settings that are null until the model is built.
_FILLED_BY_MODEL = ("data.mean", "data.std", "data.seg_length")


def check_same_run(previous: dict[str, Any], config: Config, path: str | Path) -> None:
    """Make sure that a resumed run has the settings it began with. More epochs only warn.

    Args:
        previous: the configuration in the checkpoint, as `Config.to_dict` wrote it.
        path: the checkpoint, for messages.

    Raises:
        ConfigError: a setting that makes another run of it, with both values.
    """
    try:
        changed = _changed_settings(previous, config, _FREE_ON_RESUME)
    except ConfigError as error:
        raise ConfigError(f"{path}: was written by another version of this code ({error})") from None
    epochs = changed.pop("solver.epochs", None)
    for key, (old, new) in changed.items():
        raise ConfigError(
            f"{path}: {key} was {old!r} in this run and is now {new!r}; "
            "to start another run from its weights, name it in pretrain instead of resume"
        )
    if epochs is not None:
        old, new = epochs
        warnings.warn(f"solver.epochs was {old} and is now {new}: the learning rate follows", stacklevel=2)


def difference(previous: dict[str, Any], config: Config, more_epochs: bool, same_start: bool) -> str | None:
    """Why a run with the configuration `previous` (as `Config.to_dict` wrote it) is another run, in words; or None.

    Args:
        more_epochs: another number of epochs does not make another run.
        same_start: another checkpoint to start from (`resume`, `pretrain`) does.
    """
    free = tuple(key for key in _FREE_ON_RESUME if not same_start or key not in ("resume", "pretrain"))
    free += ("solver.epochs",) if more_epochs else ()
    try:
        changed = _changed_settings(previous, config, free)
    except ConfigError as error:
        return f"its configuration is of another version of this code ({error})"
    return next((f"{key} was {old!r} and is now {new!r}" for key, (old, new) in changed.items()), None)


def _changed_settings(previous: dict[str, Any], config: Config, free: tuple[str, ...]) -> dict[str, tuple[Any, Any]]:
    """The settings that differ, with both values, but those whose dotted key begins with one of `free`.

    A null value of _FILLED_BY_MODEL is the model's own, so it equals what the other configuration has there. A key
    that `previous` does not have is at its default.
    """
    old, new = _flat(config_from_dict(previous).to_dict()), _flat(config.to_dict())
    changed = {key: (old.get(key), new.get(key)) for key in sorted(old.keys() | new.keys()) if not key.startswith(free)}
    return {
        key: (was, now)
        for key, (was, now) in changed.items()
        if was != now and not (key in _FILLED_BY_MODEL and None in (was, now))
    }


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def fill_options(cls: type, values: dict[str, Any], path: str) -> Any:
    """Fill a dataclass of options from plain values with the same checks as the rest; `path` is its dotted name."""
    return _fill(cls, values, path, [])


def parse_ratio(value: float | str) -> float:
    """A positive number, or a fraction string such as "1/6", as a float. Raises ValueError."""
    try:
        number = float(Fraction(value.replace(" ", ""))) if isinstance(value, str) else float(value)
    except (ValueError, TypeError, ZeroDivisionError):
        raise ValueError(f"{value!r} is neither a number nor a fraction such as '1/6'") from None
    if not 0 < number < float("inf"):
        raise ValueError(f"{value!r} must be above 0")
    return number


def nearest(name: str, known: typing.Iterable[str]) -> str | None:
    """The known name most like `name`, or None if none is like it."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return found[0] if found else None


class _DuplicateKey(Exception):
    def __init__(self, key: str, line: int):
        super().__init__(key)
        self.key, self.line = key, line


def _note_lines(node: yaml.Node | None, prefix: str, lines: dict[str, int]) -> None:
    """Record the line of every dotted key and refuse duplicates, which PyYAML would resolve silently."""
    if not isinstance(node, yaml.MappingNode):
        return
    for key_node, value_node in node.value:
        key = f"{prefix}{key_node.value}"
        if key in lines:
            raise _DuplicateKey(key, key_node.start_mark.line + 1)
        lines[key] = key_node.start_mark.line + 1
        _note_lines(value_node, f"{key}.", lines)


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    parts = [part.strip() for part in key.split(".")]
    if not separator or not all(parts):
        raise ConfigError(f"--set {override}: write it as section.key=value")
    try:
        value = yaml.safe_load(text) if text.strip() else None
    except yaml.YAMLError:
        value = text  # such as {:05d}.jpg, which opens like a mapping; the type is checked with the rest
    section = values
    for part in parts[:-1]:
        if section.get(part) is None:
            section[part] = {}
        section = section[part]
        if not isinstance(section, dict):
            raise ConfigError(f"{'.'.join(parts)}: {part} is a value, not a section")
    section[parts[-1]] = value


def _fill(cls: type, values: Any, path: str, dead: list[str]) -> Any:
    """Build the dataclass `cls` from a mapping; `path` is its dotted name."""
    if not isinstance(values, dict):
        raise ConfigError(f"{path or 'the file'}: must be a section of keys, not {values!r}")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    filled = {}
    for key, value in values.items():
        dotted = f"{path}.{key}" if path else str(key)
        if dotted in ALIASES:
            dotted = ALIASES[dotted]
            key = dotted.rpartition(".")[2]
            if key in values:
                raise ConfigError(f"{dotted}: is given under two names")
        if dotted in DEAD_KEYS:
            dead.append(dotted)
        elif key not in fields:
            known = [f"{path}.{name}" for name in fields] if path.count(".") else _all_keys(Config)
            raise ConfigError(f"{dotted}: unknown key{_hint(dotted, known, str(key), path)}")
        elif value is None and not _optional(hints[key]) and _has_default(fields[key]):
            continue  # an empty key, as the published files have them, means the default
        else:
            filled[key] = _convert(hints[key], value, dotted, dead)
    for name, spec in fields.items():
        if name not in filled and not _has_default(spec):
            raise ConfigError(f"{f'{path}.{name}' if path else name}: is required")
    built = cls(**filled)
    if hasattr(built, "check"):
        built.check()
    return built


def _convert(kind: Any, value: Any, key: str, dead: list[str]) -> Any:
    """Turn a YAML value into the type a field declares, or say what is wrong with it."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return None if value is None else _convert(next(a for a in arguments if a is not type(None)), value, key, dead)
    if dataclasses.is_dataclass(kind):
        return _fill(kind, value, key, dead)
    if kind is Ratio:
        if not isinstance(value, bool):
            try:
                return Ratio(parse_ratio(value))
            except ValueError as error:
                raise ConfigError(f"{key}: {error}") from None
    elif origin is Literal:
        if value is False and "off" in arguments:
            value = "off"  # which YAML reads as false
        if any(value == choice and type(value) is type(choice) for choice in arguments):
            return value
        close = _hint(str(value), [str(choice) for choice in arguments])
        raise ConfigError(f"{key}: must be one of {', '.join(map(str, arguments))}, not {value!r}{close}")
    elif origin is tuple:
        if isinstance(value, (list, tuple)):
            kinds = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else arguments
            if len(kinds) == len(value):
                return tuple(
                    _convert(k, v, f"{key}[{i}]", dead) for i, (k, v) in enumerate(zip(kinds, value, strict=True))
                )
            raise ConfigError(f"{key}: must hold {len(kinds)} values, not {len(value)}")
    elif origin is dict:
        if isinstance(value, dict) and all(isinstance(name, str) for name in value):
            return value
    elif kind is bool:
        if isinstance(value, bool):
            return value
    elif kind is int:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    elif kind is float:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return _finite(float(value), key)
        if isinstance(value, str):  # PyYAML reads 1e-3, without a dot, as text
            try:
                return _finite(float(value), key)
            except ValueError:
                pass
    elif kind is str and isinstance(value, str):
        return value
    raise ConfigError(f"{key}: must be {_describe(kind)}, not {value!r}")


def _finite(number: float, key: str) -> float:
    if number != number or number in (float("inf"), float("-inf")):
        raise ConfigError(f"{key}: must be a finite number")
    return number


def _describe(kind: Any) -> str:
    if typing.get_origin(kind) is tuple:
        return f"a list of {_describe(typing.get_args(kind)[0]).removeprefix('a ').removeprefix('an ')}s"
    names = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "a text",
        Ratio: "a number or a fraction such as '1/6'",
    }
    return names.get(kind, str(kind))


def _optional(kind: Any) -> bool:
    return type(None) in typing.get_args(kind)


def _has_default(spec: dataclasses.Field) -> bool:
    return spec.default is not dataclasses.MISSING or spec.default_factory is not dataclasses.MISSING


def _all_keys(cls: type, prefix: str = "") -> list[str]:
    """Every dotted key below a dataclass."""
    keys = []
    for name, kind in typing.get_type_hints(cls).items():
        inner = next((a for a in (kind, *typing.get_args(kind)) if dataclasses.is_dataclass(a)), None)
        keys += [f"{prefix}{name}", *(_all_keys(inner, f"{prefix}{name}.") if inner else [])]
    return keys


def _hint(name: str, known: typing.Sequence[str], leaf: str = "", section: str = "") -> str:
    """`; did you mean ...?`: the nearest of the same section, else the same leaf elsewhere, else the nearest of all."""
    siblings = [key for key in known if key.rpartition(".")[0] == section] if leaf else []
    elsewhere = [key for key in known if leaf and key.rpartition(".")[2] == leaf]
    close = nearest(name, siblings) if siblings and nearest(leaf, [s.rpartition(".")[2] for s in siblings]) else None
    close = close or (elsewhere[0] if elsewhere else nearest(name, known))
    return f"; did you mean {close}?" if close else ""


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def _require(condition: bool, key: str, message: str) -> None:
    if not condition:
        raise ConfigError(f"{key}: {message}")


def _positive(section: Any, path: str, *keys: str) -> None:
    for key in keys:
        value = getattr(section, key)
        _require(value is None or value > 0, f"{path}.{key}", f"must be above 0, not {value}")


def _within(section: Any, path: str, low: float, high: float, *keys: str) -> None:
    for key in keys:
        value = getattr(section, key)
        _require(
            value is None or low <= value <= high, f"{path}.{key}", f"must lie between {low} and {high}, not {value}"
        )
