"""The text head: a classifier made of CLIP's text embeddings of the class names, with CLIP's logit scale.

Its state dict holds all that it needs to classify: a checkpoint needs neither the text tower nor the names. What is not
trainable in it is a buffer, not a frozen parameter, so that checkpoints without the frozen weights hold it too.

Letters: B clips, D the vision tower's width, E width of the space of images and texts, K classes, P templates,
L tokens, M texts.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from open_clip.transformer import QuickGELU, TextTransformer
from torch import Tensor, nn

from clip.ops import as_is, tensor_versions, working_dtype
from clip.towers.base import Tower, TowerError
from clip.towers.openclip_vit import OpenClipTower
from clip.towers.weights import ClipWeights, TextWeights, check_fit, find_weights
from configs.schema import Config, ConfigError

CHUNK = 256  # texts that go through the tower at a time where no gradient is needed


@dataclass(frozen=True)
class TextSizes:
    """Sizes of CLIP's plain text tower: causal attention, read at the end of the text."""

    context_length: int = 77
    vocab_size: int = 49408
    width: int = 512
    heads: int = 8
    layers: int = 12
    mlp_ratio: float = 4.0
    embed: int = 512  # E

    @classmethod
    def of_model(cls, name: str) -> TextSizes:
        """The sizes in open_clip's model `name`. Raises TowerError for a text tower of another kind."""
        model = open_clip.get_model_config(name)
        text = {"embed": model["embed_dim"], **model["text_cfg"]}
        if unknown := sorted(text.keys() - cls.__dataclass_fields__.keys()):
            raise TowerError(
                f"network.head: text needs CLIP's own text tower and vocabulary, "
                f"and those of {name} are others ({unknown[0]}: {text[unknown[0]]})"
            )
        return cls(**text)

    @classmethod
    def of_weights(cls, weights: TextWeights, heads: int | None = None) -> TextSizes:
        """The sizes of a file's weights. They do not say their heads: None means 64 channels each, as in OpenAI's."""
        text = weights.text
        vocab_size, width = text["token_embedding.weight"].shape
        return cls(
            context_length=len(text["positional_embedding"]),
            vocab_size=vocab_size,
            width=width,
            heads=heads or max(1, width // 64),
            layers=len({key.split(".")[2] for key in text if key.startswith("transformer.resblocks.")}),
            mlp_ratio=len(text["transformer.resblocks.0.mlp.c_fc.weight"]) / width,
            embed=weights.projection.shape[1],
        )


def words(name: str) -> str:
    """A class's name as text: `brush_hair` -> brush hair, `ApplyEyeMakeup` -> apply eye makeup, `Moving [something] up`
    -> Moving something up. A name with spaces keeps its case."""
    text = re.sub(r"[\[\]]", "", name).replace("_", " ").strip()
    if " " not in text:
        text = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", " ", text).lower()
    return re.sub(r"\s+", " ", text)


def prompts(names: Sequence[str], templates: Sequence[str]) -> list[str]:
    """P*K texts: each class in the first template, each in the second, ..."""
    return [template.replace("{}", words(name)) for template in templates for name in names]


@functools.cache
def _tokenizer() -> open_clip.SimpleTokenizer:
    """CLIP's byte pairs, which come with open_clip; reading them takes a while."""
    return open_clip.SimpleTokenizer()


def tokenize(names: Sequence[str], templates: Sequence[str], sizes: TextSizes) -> Tensor:
    """The tokens of `prompts`, padded with zeros: (P*K, context_length) int64.

    Raises:
        ConfigError: a text tower with another vocabulary; a name without words, a name that makes too long a text, two
            names that make the same text. The message has the classes' ids.
    """
    tokenizer, texts = _tokenizer(), prompts(names, templates)
    if tokenizer.vocab_size != sizes.vocab_size:
        raise ConfigError(
            f"network.head: text reads CLIP's vocabulary of {tokenizer.vocab_size} tokens, "
            f"and this text tower has {sizes.vocab_size}"
        )
    for label, name in enumerate(names):
        if not tokenizer.encode(words(name)):
            raise ConfigError(f"data.label_list: the name of class {label}, {_quoted(name)}, has no words")
    encoded = [tuple(tokenizer.encode(text)) for text in texts]
    for index, text in enumerate(texts):
        if (length := len(encoded[index]) + 2) > sizes.context_length:  # with the tokens of start and end
            raise ConfigError(
                f"data.label_list: class {index % len(names)} has {length} tokens with its template, "
                f"and CLIP's text tower reads {sizes.context_length}: {_quoted(text)}"
            )
    first: dict[tuple[int, ...], int] = {}
    for label, tokens in enumerate(encoded[: len(names)]):
        if (other := first.setdefault(tokens, label)) != label:
            raise ConfigError(
                f"data.label_list: classes {other} and {label}, {_quoted(names[other])} and {_quoted(names[label])}, "
                "are the same text, so that no text head tells them apart"
            )
    return tokenizer(texts, context_length=sizes.context_length)


def _quoted(text: str, length: int = 60) -> str:
    return repr(text if len(text) <= length else f"{text[:length]}...")


class TextTower(TextTransformer):
    """open_clip's text tower on texts cut to the longest one: tokens after a text's end do not count.

    Args:
        quick_gelu: whether the activation is QuickGELU, as in the vision tower.
        recompute: run each block again in backward instead of saving its activations.
    """

    def __init__(self, sizes: TextSizes, quick_gelu: bool, recompute: bool = False):
        super().__init__(
            context_length=sizes.context_length,
            vocab_size=sizes.vocab_size,
            width=sizes.width,
            heads=sizes.heads,
            layers=sizes.layers,
            mlp_ratio=sizes.mlp_ratio,
            output_dim=sizes.embed,
            act_layer=QuickGELU if quick_gelu else nn.GELU,
        )
        self.set_grad_checkpointing(recompute)

    def forward(self, tokens: Tensor) -> Tensor:
        """(M, L) integers, L up to the context length -> (M, E)."""
        L = tokens.shape[1]
        x = self.token_embedding(tokens) + self.positional_embedding[:L]  # (M, L, width)
        x = self.transformer(x, attn_mask=self.attn_mask[:L, :L])
        ends = tokens.argmax(1)  # the end token is the last of the vocabulary
        return self.ln_final(x[torch.arange(len(x), device=x.device), ends]) @ self.text_projection

    def trainable_layers(self) -> list[list[nn.Module | nn.Parameter]]:
        """From input to output: embeddings, each block, norm and projection."""
        blocks = [[block] for block in self.transformer.resblocks]
        return [
            [self.token_embedding, self.positional_embedding],
            *blocks,
            [self.ln_final, self.text_projection],
        ]


class ClassTexts(nn.Module):
    """The text tower's embeddings of K classes: for each the mean over templates of its normalised embeddings.

    Without gradients the result is kept until weights are loaded or exchanged, or a pass with gradients is made: torch's
    fused optimizers leave no mark on the weights they change. A pass with gradients takes all texts at once, however few
    the clips, and saves memory in proportion to P*K*L: see TextConfig.

    Args:
        tower: CLIP's text tower.
        tokens: (P*K, L), of `tokenize`.
        classes: K.

    Shape: () -> (K, E).
    """

    def __init__(self, tower: TextTower, tokens: Tensor, classes: int):
        super().__init__()
        self.tower, self.classes = tower, classes
        self.register_buffer("tokens", tokens.to(torch.int32))
        self._length = _longest(tokens)
        self._cached: tuple[Any, Tensor] | None = None  # dtype and versions of the weights, result

    def forward(self) -> Tensor:
        if not torch.is_grad_enabled():
            return self._cached_result()
        self._cached = None
        return self._compute(len(self.tokens))

    def _compute(self, texts_at_a_time: int) -> Tensor:
        tokens = self.tokens[:, : self._length]
        texts = torch.cat([self.tower(part) for part in tokens.split(texts_at_a_time)])  # (P*K, E)
        with as_is(texts):
            texts = F.normalize(texts.to(self.tower.text_projection.dtype), dim=-1)
        return texts.unflatten(0, (-1, self.classes)).mean(0)  # (P, K, E) -> (K, E)

    @torch.compiler.disable
    def _cached_result(self) -> Tensor:
        values = [*self.tower.parameters(), self.tokens]
        made_of = working_dtype(self.tower.text_projection), tensor_versions(values)
        if self._cached is None or self._cached[0] != made_of:
            self._cached = made_of, self._compute(CHUNK)
        return self._cached[1]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *arguments)
        self._length = _longest(self.tokens)


def _longest(tokens: Tensor) -> int:
    """The length of the longest text of (M, L), with its end."""
    return int(tokens.argmax(1).max()) + 1


class TextHead(nn.Module):
    """CLIP's classifier: exp(logit_scale) times the cosine between a video's embedding and each class's.

    Args:
        projection: (D, E), CLIP's own; never trainable.
        classes: (K, E), of any length, or the module that computes it, which is then trainable.
        logit_scale: ().
        trainable: whether classes and scale are trainable. Weight decay draws a trainable scale towards a factor of 1,
            as it draws all weights to 0, unless solver.decay_norms is false, which exempts scalars.
        filled: False if the values are random and wait for a checkpoint.
        named: whether the classes, or the tokens they are computed of, are those of class names.

    Shape: features (B, D), in CLIP's space before the projection -> logits (B, K), in float32 or float64.

    Source: Radford et al. 2021, section 3.1; a classifier that starts there: Wu et al. 2023 (AAAI, Text4Vis).
    """

    def __init__(
        self,
        projection: Tensor,
        classes: Tensor | ClassTexts,
        logit_scale: Tensor,
        trainable: bool,
        filled: bool = True,
        named: bool = True,
    ):
        super().__init__()
        self.register_buffer("projection", projection)
        if isinstance(classes, ClassTexts):
            self.classes = classes
        elif trainable:
            self.classes = nn.Parameter(classes)
        else:
            self.register_buffer("classes", classes)
        if trainable:
            self.logit_scale = nn.Parameter(logit_scale)
        else:
            self.register_buffer("logit_scale", logit_scale)
        self.filled, self.named = filled, named

    def of_names(self) -> set[str]:
        """Keys of the state dict whose values follow from the class names alone; a pretrained head's may differ."""
        if not self.named:
            return set()
        if isinstance(self.classes, ClassTexts):
            return {"classes.tokens"}
        return set() if isinstance(self.classes, nn.Parameter) else {"classes"}

    def trainable_modules(self) -> dict[str, nn.Module | nn.Parameter]:
        """The head's part of a model's trainable modules; the last is the classifier."""
        if isinstance(self.classes, ClassTexts):
            return {"text": self.classes.tower, "head": self.logit_scale}
        return {"head": self}

    def trainable_layers(self) -> list[list[nn.Module | nn.Parameter]]:
        """The same from the input to the classifier."""
        if isinstance(self.classes, ClassTexts):
            return [*self.classes.tower.trainable_layers(), [self.logit_scale]]
        return [[self]]

    def forward(self, features: Tensor) -> Tensor:
        classes = self.classes() if isinstance(self.classes, ClassTexts) else self.classes
        with as_is(features):
            video = F.normalize(features.to(self.projection.dtype) @ self.projection, dim=-1)  # (B, E)
            return self.logit_scale.exp() * video @ F.normalize(classes, dim=-1).T  # (B, K)

    def require_filled(self) -> None:
        """Raise ConfigError if the classes are random."""
        if not self.filled:
            raise ConfigError(
                "network.head: text has no classes: it makes them of the names in data.label_list and of CLIP's "
                "weights, or takes a checkpoint's"
            )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *arguments)
        loaded = {key.removeprefix(prefix).split(".")[0] for key in state_dict if key.startswith(prefix)}
        self.filled = self.filled or {"projection", "classes"} <= loaded


def head_kind(keys: Iterable[str]) -> str:
    """The classifier of a model's state dict, in the words of a configuration."""
    parts = {".".join(key.split(".")[1:3]) for key in keys if key.startswith("head.")}
    if "classes.tokens" in parts:
        return "network.head text with network.text.tuned tower"
    if "classes" in parts:
        return "network.head text with network.text.tuned none or classifier"
    return "network.head linear" if "weight" in parts else "of a kind unknown here"


def build_text_head(
    config: Config, tower: Tower, class_names: Sequence[str] | None = None, pretrained: bool = True
) -> TextHead:
    """The text head of a configuration, for features of `tower`.

    Args:
        config: network.text says what is trainable, and data.num_classes is K.
        tower: CLIP's vision tower, of `build_tower`.
        class_names: K of them, or None if a checkpoint brings the head.
        pretrained: False if a checkpoint brings the head, which is then random until it is loaded. Classes that are not
            trainable are made of `class_names` all the same.

    Raises:
        TowerError: a tower of another kind, weights that cannot be read or do not fit.
        ConfigError: see `tokenize`; heads that do not divide the text tower's width.
    """
    network, text, classes = config.network, config.network.text, config.data.num_classes
    _check_tower(tower)
    pretrained = pretrained or (class_names is not None and text.tuned == "none")
    if pretrained and not network.init:
        raise TowerError(
            "network.head: text needs a pretrained CLIP, but network.init is false: set it to true, "
            "or network.head to linear"
        )
    filled, custom = class_names is not None and pretrained, network.vision is not None
    file = None
    if network.init and (filled or custom):  # a custom CLIP's sizes are in its file
        file = tower.clip_weights or ClipWeights(network.arch, find_weights(network.arch, network.weights))
    tower.clip_weights = None  # read to the end
    weights = None if file is None else file.text()
    sizes = _custom_sizes(tower, weights, text.heads) if custom else TextSizes.of_model(tower.name)
    if weights is None:
        projection = torch.randn(tower.width, sizes.embed) * tower.width**-0.5
        scale = torch.tensor(math.log(1 / 0.07))
    else:
        own = {"proj": torch.zeros(tower.width, sizes.embed), "logit_scale": torch.zeros(())}
        found = {"proj": weights.projection, "logit_scale": weights.logit_scale}
        check_fit(found, own, file.path, tower.name)
        projection, scale = weights.projection.clone(), weights.logit_scale.clone()
    if text.tuned != "tower" and not filled:
        random = torch.randn(classes, sizes.embed)
        return TextHead(projection, random, scale, trainable=text.tuned == "classifier", filled=False, named=False)
    text_tower = TextTower(sizes, tower.quick_gelu, network.recompute)
    if weights is not None:
        check_fit(weights.text, text_tower.state_dict(), file.path, f"the text tower of {tower.name}")
        text_tower.load_state_dict(weights.text)
    tokens = tokenize(class_names or [str(label) for label in range(classes)], text.templates, sizes)
    texts = ClassTexts(text_tower, tokens, classes)
    if text.tuned == "tower":
        return TextHead(projection, texts, scale, trainable=True, filled=filled, named=class_names is not None)
    with torch.no_grad():
        return TextHead(projection, texts(), scale, trainable=text.tuned == "classifier")


def _check_tower(tower: Tower) -> None:
    """Raise TowerError unless the tower's class token can be projected to the space of CLIP's texts."""
    if not isinstance(tower, OpenClipTower):
        raise TowerError(f"network.head: text is not supported for towers that timm wrote, and {tower.name} is one")
    if tower.visual.pool_type != "tok":
        raise TowerError(
            f"network.head: text needs a vision tower that projects its class token to the texts' space, "
            f"and {tower.name} projects the mean of its tokens"
        )


def _custom_sizes(tower: Tower, weights: TextWeights | None, heads: int | None) -> TextSizes:
    """Sizes of a custom CLIP's text tower: its file's, or without a file those of the vision tower."""
    if weights is not None:
        sizes = TextSizes.of_weights(weights, heads)
    else:
        width, layers = tower.width, len(tower.blocks)
        sizes = TextSizes(width=width, heads=heads or max(1, width // 64), layers=layers, embed=width)
    if sizes.width % sizes.heads:
        raise ConfigError(f"network.text.heads: {sizes.heads} do not divide the width {sizes.width} of the text tower")
    return sizes
