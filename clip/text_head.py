"""The text head: a classifier made of what CLIP's text tower says of the class names, with CLIP's logit scale.

Lives here: from a class's name to tokens, the text tower, the heads, and building them from CLIP's weights. Does not
live here: reading those weights (weights.py), which methods may have such a head (build.py), the vision tower.

A head keeps in its state dict all that it needs to classify: a checkpoint needs neither the text tower nor the names.
What of it is not tuned are buffers and not frozen parameters, so that checkpoints without the frozen weights hold it.

Letters: B clips, D the vision tower's width, E width of the space of images and texts, K classes, P templates,
L tokens.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import open_clip
import torch
import torch.nn.functional as F
from open_clip.transformer import QuickGELU, TextTransformer
from torch import Tensor, nn

from clip.ops import as_is, working_dtype
from clip.towers.base import Tower, TowerError
from clip.towers.openclip_vit import OpenClipTower
from clip.towers.weights import TextWeights, check_fit, fetch_weights, read_text_weights
from configs.schema import ConfigError

CHUNK = 256  # texts that go through the tower at a time where no gradient is wanted

Tuned = Literal["none", "classifier", "tower"]


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


def sizes_of(name: str) -> TextSizes:
    """Of an open_clip model. Raises TowerError for a text tower of another kind."""
    model = open_clip.get_model_config(name)
    text = {"embed": model["embed_dim"], **model["text_cfg"]}
    if odd := sorted(text.keys() - TextSizes.__dataclass_fields__.keys()):
        raise TowerError(
            f"network.head: text needs CLIP's own text tower and vocabulary, "
            f"and those of {name} are others ({odd[0]}: {text[odd[0]]})"
        )
    return TextSizes(**text)


def sizes_in(weights: TextWeights, heads: int | None = None) -> TextSizes:
    """Of a file's weights, which do not say their heads: None means of 64 values, as all CLIPs of OpenAI have them."""
    text = weights.text
    context_length, width = text["positional_embedding"].shape
    layers = len({key.split(".")[2] for key in text if key.startswith("transformer.resblocks.")})
    hidden = text["transformer.resblocks.0.mlp.c_fc.weight"].shape[0]
    vocabulary, embed = text["token_embedding.weight"].shape[0], weights.projection.shape[1]
    return TextSizes(context_length, vocabulary, width, heads or max(1, width // 64), layers, hidden / width, embed)


def words(name: str) -> str:
    """A class's name as a text: `brush_hair` -> brush hair, `ApplyEyeMakeup` -> apply eye makeup, `Moving [something]
    up` -> Moving something up. Names of several words are taken as they are otherwise."""
    text = re.sub(r"[\[\]]", "", name).replace("_", " ").strip()
    if " " not in text:
        text = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", " ", text).lower()
    return re.sub(r"\s+", " ", text)


def prompts(names: Sequence[str], templates: Sequence[str]) -> list[str]:
    """P*K texts: each class in the first template, each in the second, ..."""
    return [template.replace("{}", words(name)) for template in templates for name in names]


@functools.cache
def _tokenizer() -> open_clip.SimpleTokenizer:
    """CLIP's byte pairs, which open_clip brings along; reading them takes a while."""
    return open_clip.SimpleTokenizer()


def tokenize(names: Sequence[str], templates: Sequence[str], sizes: TextSizes) -> Tensor:
    """The tokens of `prompts`, filled up with zeros: (P*K, context_length) int64.

    Raises:
        ConfigError: a text tower with another vocabulary; a name without words, one that makes too long a text, two
            that make the same. The message has the classes' ids.
    """
    tokenizer, texts = _tokenizer(), prompts(names, templates)
    if tokenizer.vocab_size != sizes.vocab_size:
        raise ConfigError(
            f"network.head: text reads CLIP's vocabulary of {tokenizer.vocab_size} tokens, "
            f"and this text tower has {sizes.vocab_size}"
        )
    for label, name in enumerate(names):
        if not tokenizer.encode(words(name)):
            raise ConfigError(f"data.label_list: the name of class {label}, {_short(name)}, has no words")
    encoded = [tuple(tokenizer.encode(text)) for text in texts]
    for place, text in enumerate(texts):
        if (length := len(encoded[place]) + 2) > sizes.context_length:
            raise ConfigError(
                f"data.label_list: class {place % len(names)} has {length} tokens with its template, "
                f"and CLIP's text tower reads {sizes.context_length}: {_short(text)}"
            )
    first: dict[tuple[int, ...], int] = {}
    for label, tokens in enumerate(encoded[: len(names)]):
        if (other := first.setdefault(tokens, label)) != label:
            raise ConfigError(
                f"data.label_list: classes {other} and {label}, {_short(names[other])} and {_short(names[label])}, "
                "are the same text, so that no text head tells them apart"
            )
    return tokenizer(texts, context_length=sizes.context_length)


def _short(text: str, most: int = 60) -> str:
    """A text to quote."""
    return repr(text if len(text) <= most else f"{text[:most]}...")


class TextTower(TextTransformer):
    """CLIP's text tower by open_clip, on texts cut where the longest ends: what follows a text's end does not count.

    Args:
        quick_gelu: its activation, which is the vision tower's. recompute: run each block again in backward instead of
            keeping its activations.
    """

    def __init__(self, sizes: TextSizes, quick_gelu: bool, recompute: bool = False):
        super().__init__(
            sizes.context_length, sizes.vocab_size, sizes.width, sizes.heads, sizes.layers, sizes.mlp_ratio,
            output_dim=sizes.embed, act_layer=QuickGELU if quick_gelu else nn.GELU,
        )  # fmt: skip
        self.set_grad_checkpointing(recompute)

    def forward(self, tokens: Tensor) -> Tensor:
        """(M, L) integers, L up to the context length -> (M, E)."""
        L = tokens.shape[1]
        x = self.token_embedding(tokens) + self.positional_embedding[:L]  # (M, L, width)
        x = self.transformer(x, attn_mask=self.attn_mask[:L, :L])
        ends = tokens.argmax(1)  # the end of a text is the last of the vocabulary
        return self.ln_final(x[torch.arange(len(x), device=x.device), ends]) @ self.text_projection

    def parts(self) -> list[list[nn.Module | nn.Parameter]]:
        """All of it from the tokens on: embeddings, each block, norm and projection."""
        blocks = [[block] for block in self.transformer.resblocks]
        return [
            [self.token_embedding, self.positional_embedding],
            *blocks,
            [self.ln_final, self.text_projection],
        ]


class ClassTexts(nn.Module):
    """What CLIP's text tower says of K classes: for each the mean over templates of normalised embeddings.

    Without gradients the result is kept until weights are loaded or exchanged, or a pass with gradients is made:
    torch's fused optimizers leave no mark on what they change. A pass with gradients is over all texts at once,
    however few the clips, and what it keeps grows with P*K*L: see TextConfig.

    Args:
        tower: CLIP's. tokens: (P*K, L), of `prompts`. classes: K.

    Shape: () -> (K, E).
    """

    def __init__(self, tower: TextTower, tokens: Tensor, classes: int):
        super().__init__()
        self.tower, self.classes = tower, classes
        self.register_buffer("tokens", tokens.to(torch.int32))
        self._length = _longest(tokens)
        self._kept: tuple[Any, Tensor] | None = None  # the result, and of which weights

    def forward(self) -> Tensor:
        if not torch.is_grad_enabled():
            return self._keep()
        self._kept = None
        return self._compute(len(self.tokens))

    def _compute(self, most: int) -> Tensor:
        """With `most` texts at a time."""
        tokens = self.tokens[:, : self._length]
        texts = torch.cat([self.tower(part) for part in tokens.split(most)])  # (P*K, E)
        with as_is(texts):
            texts = F.normalize(texts.to(self.tower.text_projection.dtype), dim=-1)
        return texts.unflatten(0, (-1, self.classes)).mean(0)  # (P, K, E) -> (K, E)

    @torch.compiler.disable
    def _keep(self) -> Tensor:
        values = [*self.tower.parameters(), self.tokens]
        marks: list[Any] = [(value.data_ptr(), 0 if value.is_inference() else value._version) for value in values]
        marks.append(working_dtype(self.tower.text_projection))
        if self._kept is None or self._kept[0] != marks:
            self._kept = marks, self._compute(CHUNK)
        return self._kept[1]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *arguments)
        self._length = _longest(self.tokens)


def _longest(tokens: Tensor) -> int:
    """The length of the longest text (M, L), with its end."""
    return int(tokens.argmax(1).max()) + 1


class TextHead(nn.Module):
    """CLIP's classifier: exp(logit_scale) times the cosine between what CLIP says of a video and of each class.

    Args:
        projection: (D, E), CLIP's own; never tuned.
        classes: (K, E), of any length, or the module that computes it, which is then tuned.
        logit_scale: (). tuned: whether classes and scale are tuned. A tuned scale is weight-decayed as all that is
            tuned, towards a factor of 1, unless solver.decay_norms is false, which exempts scalars.
        filled: False if these are random values of the right shapes, until a checkpoint brings others.
        named: whether classes, or the tokens that they are computed of, are those of class names.

    Shape: features (B, D) in CLIP's space before the projection -> logits (B, K), in float32 or float64.

    Source: Radford et al. 2021, section 3.1; a classifier that starts there: Wu et al. 2023 (AAAI, Text4Vis).
    """

    def __init__(self, projection: Tensor, classes: Tensor | ClassTexts, logit_scale: Tensor, tuned: bool,
                 filled: bool = True, named: bool = True):  # fmt: skip
        super().__init__()
        self.register_buffer("projection", projection)
        if isinstance(classes, ClassTexts):
            self.classes = classes
        elif tuned:
            self.classes = nn.Parameter(classes)
        else:
            self.register_buffer("classes", classes)
        if tuned:
            self.logit_scale = nn.Parameter(logit_scale)
        else:
            self.register_buffer("logit_scale", logit_scale)
        self.filled, self.named = filled, named

    def of_names(self) -> set[str]:
        """Keys of the state dict that class names alone decide: a pretrained head has them of other names, maybe."""
        if not self.named:
            return set()
        if isinstance(self.classes, ClassTexts):
            return {"classes.tokens"}
        return set() if isinstance(self.classes, nn.Parameter) else {"classes"}

    def trainable_modules(self) -> dict[str, nn.Module | nn.Parameter]:
        """What stands for `head` where parts of a model are told apart; the last is the classifier."""
        if isinstance(self.classes, ClassTexts):
            return {"text": self.classes.tower, "head": self.logit_scale}
        return {"head": self}

    def trainable_layers(self) -> list[list[nn.Module | nn.Parameter]]:
        """The same from the input to the classifier."""
        if isinstance(self.classes, ClassTexts):
            return [*self.classes.tower.parts(), [self.logit_scale]]
        return [[self]]

    def forward(self, features: Tensor) -> Tensor:
        classes = self.classes() if isinstance(self.classes, ClassTexts) else self.classes
        with as_is(features):
            video = F.normalize(features.to(self.projection.dtype) @ self.projection, dim=-1)  # (B, E)
            return self.logit_scale.exp() * video @ F.normalize(classes, dim=-1).T

    def require_filled(self) -> None:
        """Raise ConfigError if the classes are random."""
        if not self.filled:
            raise ConfigError(
                "network.head: text has no classes: it makes them of the names in data.label_list and of CLIP's "
                "weights, or takes a checkpoint's"
            )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *arguments)
        brought = {key.removeprefix(prefix).split(".")[0] for key in state_dict if key.startswith(prefix)}
        self.filled = self.filled or {"projection", "classes"} <= brought


def head_kind(keys: Iterable[str]) -> str:
    """Which classifier a model's state dict has, in the words of a configuration."""
    parts = {".".join(key.split(".")[1:3]) for key in keys if key.startswith("head.")}
    if "classes.tokens" in parts:
        return "network.head text with network.text.tuned tower"
    if "classes" in parts:
        return "network.head text with network.text.tuned none or classifier"
    return "network.head linear" if "weight" in parts else "of a kind unknown here"


def build_text_head(tower: Tower, classes: int, templates: Sequence[str], tuned: Tuned, source: str | None,
                    names: Sequence[str] | None, pretrained: bool = True, heads: int | None = None,
                    recompute: bool = False) -> TextHead:  # fmt: skip
    """A head for features of `tower`.

    Args:
        tower: CLIP's vision tower. classes: K. templates, tuned, heads: of network.text.
        source: where the weights of this CLIP are (see weights.find_weights), or None for random ones.
        names: of the classes. pretrained: whether the text tower is read; without names or this, a head is not filled,
            for a checkpoint that brings one, or to measure. Sizes of a custom CLIP come from `source` in any case.
        recompute: run the blocks of a tuned text tower again in backward instead of keeping their activations.

    Raises:
        TowerError: a tower of another kind, weights that cannot be had. ConfigError: see `tokenize`; heads that do
            not divide the text tower's width.
    """
    if not isinstance(tower, OpenClipTower):
        raise TowerError(f"network.head: text is not supported for trunks that timm wrote, and {tower.name} is one")
    if tower.visual.pool_type != "tok":
        raise TowerError(
            f"network.head: text needs a vision tower that projects its class token to the texts' space, "
            f"and {tower.name} projects the mean of its tokens"
        )
    if source is None and pretrained:
        raise TowerError(
            "network.head: text needs a pretrained CLIP, but network.init is false: set it to true, "
            "or network.head to linear"
        )
    custom, filled, weights = tower.name == "custom", names is not None and pretrained, None
    if source is not None and (custom or filled):
        path = fetch_weights(tower.name, source)
        weights = read_text_weights(path)
    if custom:
        sizes = _sizes_like(tower, heads) if weights is None else sizes_in(weights, heads)
        if sizes.width % sizes.heads:
            raise ConfigError(
                f"network.text.heads: {sizes.heads} do not divide the width {sizes.width} of the text tower"
            )
    else:
        sizes = sizes_of(tower.name)
    if weights is None:
        projection = torch.randn(tower.width, sizes.embed) * tower.width**-0.5
        scale = torch.tensor(math.log(1 / 0.07))
    else:
        check_fit({"proj": weights.projection}, {"proj": torch.empty(tower.width, sizes.embed)}, path, tower.name)
        projection, scale = weights.projection.clone(), weights.logit_scale.clone()
    if tuned != "tower" and not filled:
        return TextHead(projection, torch.randn(classes, sizes.embed), scale, tuned == "classifier", filled, False)
    text = TextTower(sizes, tower.quick_gelu, recompute)
    if weights is not None:
        check_fit(weights.text, text.state_dict(), path, f"the text tower of {tower.name}")
        text.load_state_dict(weights.text)
    tokens = tokenize(names or [str(label) for label in range(classes)], templates, sizes)
    texts = ClassTexts(text, tokens, classes)
    if tuned == "tower":
        return TextHead(projection, texts, scale, True, filled, names is not None)
    with torch.no_grad():
        return TextHead(projection, texts(), scale, tuned == "classifier")


def _sizes_like(tower: Tower, heads: int | None) -> TextSizes:
    """Of a random text tower beside a custom vision tower: as that one."""
    width, layers = tower.width, len(tower.blocks)
    return TextSizes(width=width, heads=heads or max(1, width // 64), layers=layers, embed=width)
