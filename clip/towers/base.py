"""The contract of a frozen image tower and of its blocks. Models work with these two classes, whichever library wrote
the vision transformer.

Letters: M images (B clips x T frames), N patch tokens, p tokens before them, L = p + N, D width, P patch size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from clip.ops import working_dtype

if TYPE_CHECKING:
    from clip.towers.weights import ClipWeights

CHUNK = 64  # images that `Block.run` takes at a time

Feature = Literal["class_token", "mean_tokens"]


class TowerError(ValueError):
    """A tower or its weights cannot be built or read as configured. The message is one sentence."""


class Block:
    """One pre-norm block of a tower: x = x + attention(norm_attention(x)), then x = x + mlp(norm_mlp(x)).

    A model that stands between the two halves calls `attend` and `transform`. A model that stands inside a half calls
    the four parts, after `Tower.keep_norms`. A subclass gives the four parts.

    A Block is a plain object: it refers to an nn.Module of the tower, which owns the weights.

    Args:
        module: the block as its library wrote it.
    """

    def __init__(self, module: nn.Module):
        self.module = module

    def norm_attention(self, x: Tensor) -> Tensor:
        """The norm before the attention: (..., D) -> (..., D)."""
        raise NotImplementedError

    def attention(self, x: Tensor, in_space: bool = True) -> Tensor:
        """The attention on normalised tokens, up to the residual sum: (M, L, D) -> (M, L, D).

        Args:
            x: normalised tokens.
            in_space: whether the tokens are those of an image, so that positions inside the block count.
        """
        raise NotImplementedError

    def norm_mlp(self, x: Tensor) -> Tensor:
        """The norm before the MLP: (..., D) -> (..., D)."""
        raise NotImplementedError

    def mlp(self, x: Tensor) -> Tensor:
        """The MLP on normalised tokens, up to the residual sum: (M, L, D) -> (M, L, D)."""
        raise NotImplementedError

    def attention_of(self, x: Tensor) -> Tensor:
        """The attention half without its residual: (M, L, D) -> (M, L, D)."""
        return self.attention(self.norm_attention(x))

    def mlp_of(self, x: Tensor) -> Tensor:
        """The MLP half without its residual: (M, L, D) -> (M, L, D)."""
        return self.mlp(self.norm_mlp(x))

    def attend(self, x: Tensor, queries: int | None = None) -> Tensor:
        """The attention half with its residual: (M, L, D) -> (M, L, D), or (M, queries, D) of the first tokens."""
        return (x + self.attention_of(x))[:, :queries]

    def transform(self, x: Tensor) -> Tensor:
        """The MLP half with its residual: (M, L, D) -> (M, L, D)."""
        return x + self.mlp_of(x)

    def run(self, x: Tensor) -> Tensor:
        """The complete block without gradients: (M, L, D) -> (M, L, D).

        It takes a few images at a time, so that the MLP's inner width is never held for all of them.
        """
        with torch.no_grad():
            parts = [self.transform(self.attend(part)) for part in x.split(CHUNK)]
            return parts[0] if len(parts) == 1 else torch.cat(parts)


class Tower(nn.Module):
    """A frozen vision transformer of pre-norm blocks: always in eval mode, no parameter requires a gradient.

    Gradients flow through it to its input. A model that needs none runs it under torch.no_grad().

    A subclass sets the attributes and gives `embed`, `final_norm` and `embedding`.

    Attributes:
        name: the architecture's name.
        weights: where the weights come from, in words: a file, a tag, or random weights.
        clip_weights: the open weights, until a text head has read the rest of them; else None.
        blocks: the Block objects, from input to output.
        width: D. patch_size: P, in pixels. grid: (H, W) patches. image_size: (height, width) in pixels.
        prefix: p. has_class_token: whether the first of these tokens is a class token (the others are registers).
        mean, std: pixel statistics of the training images, one value a channel, or None if unknown.
    """

    name: str
    weights: str
    clip_weights: ClipWeights | None
    blocks: tuple[Block, ...]
    width: int
    patch_size: int
    grid: tuple[int, int]
    image_size: tuple[int, int]
    prefix: int = 1
    has_class_token: bool = True
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None

    def __init__(self, name: str):
        super().__init__()
        self.name, self.weights, self.clip_weights = name, "random weights", None

    def train(self, mode: bool = True) -> Tower:
        """Stays in eval mode, whatever the model around it does."""
        return super().train(False)

    @property
    def block_modules(self) -> nn.ModuleList:
        """The modules of all blocks, which have their parameters."""
        return nn.ModuleList(block.module for block in self.blocks)

    @property
    def final_norm(self) -> nn.Module:
        """The norm after the last block."""
        raise NotImplementedError

    def embedding(self) -> dict[str, nn.Module | nn.Parameter]:
        """Everything with weights before the first block, by name."""
        raise NotImplementedError

    def patchify(self, images: Tensor) -> Tensor:
        """Pixels by patch: (M, 3, height, width) -> (M, N, 3*P*P), in autocast's dtype where autocast is on."""
        if tuple(images.shape[-2:]) != tuple(self.image_size):
            raise ValueError(f"the tower was built for {self.image_size} pixels and got {tuple(images.shape[-2:])}")
        (H, W), P, dtype = self.grid, self.patch_size, working_dtype(images)
        self.prepare(dtype)
        patches = images.to(dtype).unflatten(3, (W, P)).unflatten(2, (H, P))  # (M, 3, H, P, W, P)
        return patches.permute(0, 2, 4, 1, 3, 5).reshape(len(images), H * W, -1)  # (M, N, 3*P*P)

    def prepare(self, dtype: torch.dtype) -> None:
        """Called by `patchify` before a pass in `dtype`."""

    def keep_norms(self) -> None:
        """Called by a model that uses the parts of a block: a norm must then not be merged into the layer after it."""

    def embed(self, patches: Tensor, added: Tensor | None = None) -> Tensor:
        """The input of the first block, from the result of `patchify`: (M, N, 3*P*P) -> (M, L, D).

        Args:
            patches: see `patchify`.
            added: (M, 1, D), or what broadcasts to (M, L, D); added before a norm that stands before the first block.
        """
        raise NotImplementedError

    def forward(self, images: Tensor) -> Tensor:
        """All blocks, without the final norm: (M, 3, height, width) -> (M, L, D)."""
        x = self.embed(self.patchify(images))
        for block in self.blocks:
            x = block.transform(block.attend(x))
        return x

    def require(self, feature: Feature, key: str) -> None:
        """Raise TowerError if the tower has no class token and `key` of the configuration asks for it."""
        if feature == "class_token" and not self.has_class_token:
            raise TowerError(f"network.arch: {self.name} has no class token; set {key} to mean_tokens")

    def read(self, x: Tensor, feature: Feature) -> Tensor:
        """One vector an image from the last block's result: (M, L, D), or (M, 1, D) for the class token -> (M, D).

        `mean_tokens` is the mean over the class token, if there is one, and the patches. Registers do not count.
        """
        if feature == "class_token":
            return self.final_norm(x[:, :1]).squeeze(1)
        x = self.final_norm(x)
        registers = x[:, self.has_class_token : self.prefix]
        if registers.shape[1] == 0:
            return x.mean(1)
        return (x.sum(1) - registers.sum(1)) / (x.shape[1] - registers.shape[1])

    def without_registers(self, x: Tensor, feature: Feature = "class_token") -> Tensor:
        """One token for the image, then the patches: (M, L, D) -> (M, 1 + N, D).

        The first token is the class token or, with `mean_tokens`, the mean of the patches.
        """
        if feature == "class_token":
            return x if self.prefix == 1 else torch.cat([x[:, :1], x[:, self.prefix :]], 1)
        patches = x[:, self.prefix :]
        return torch.cat([patches.mean(1, keepdim=True), patches], 1)
