"""What a method may ask of a frozen image trunk, whichever library it is of. No trunk lives here.

Lives here: the base class of towers and what follows for all of them from a block's four parts. Does not live here:
CLIP's own tower (backbone.py), timm's (timm_tower.py), weights, anything tuned.

Letters: M images (B clips x T frames), N patch tokens, p tokens before them, L = p + N, D width.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from clip.ops import working_dtype

CHUNK = 64  # images that a frozen block takes at a time where no gradient goes through it

Feature = Literal["class_token", "mean_tokens"]


class TowerError(ValueError):
    """A tower or its weights cannot be had as asked; the message is one sentence."""


class Tower(nn.Module):
    """A frozen vision transformer of pre-norm blocks: never in training mode, no parameter requires a gradient.

    Gradients flow through it to its input; a method that wants none runs it under torch.no_grad(). A block is
    x = x + attention(norm_attention(x)), then x = x + mlp(norm_mlp(x)); a method uses the halves (`attend`,
    `transform`) where it stands between them, the parts where it stands inside.

    A subclass gives patchify, embed, blocks, the four parts, final_norm and embedding.

    Attributes:
        name: of the architecture. weights: where they are from, in words. width: D. patch_size: in pixels.
        grid: (H, W) patches. image_size: (height, width) in pixels. prefix: p. has_class_token: whether the first of
        these is a class token (others are registers). mean, std: of the pixels it was trained on, or None if unknown.
    """

    name: str
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
        self.name, self.weights = name, "random weights"

    def train(self, mode: bool = True) -> Tower:
        """Stays in eval mode, whatever the model around it does."""
        return super().train(False)

    @property
    def blocks(self) -> nn.ModuleList:
        raise NotImplementedError

    @property
    def final_norm(self) -> nn.Module:
        """The norm behind the last block."""
        raise NotImplementedError

    def embedding(self) -> dict[str, nn.Module | nn.Parameter]:
        """What stands before the first block and has weights, by name."""
        raise NotImplementedError

    def patchify(self, images: Tensor) -> Tensor:
        """Pixels by patch: (M, 3, height, width) -> (M, N, 3*P*P), in autocast's dtype where that is on."""
        if tuple(images.shape[-2:]) != tuple(self.image_size):
            raise ValueError(f"the tower was built for {self.image_size} pixels and got {tuple(images.shape[-2:])}")
        (H, W), P, dtype = self.grid, self.patch_size, working_dtype(images)
        self.prepare(dtype)
        patches = images.to(dtype).unflatten(3, (W, P)).unflatten(2, (H, P))  # (M, 3, H, P, W, P)
        return patches.permute(0, 2, 4, 1, 3, 5).reshape(len(images), H * W, -1)

    def prepare(self, dtype: torch.dtype) -> None:
        """A pass in `dtype` begins."""

    def embed(self, patches: Tensor, added: Tensor | None = None) -> Tensor:
        """What the first block sees, of what `patchify` gave: (M, N, 3*P*P) -> (M, L, D).

        Args:
            added: (M, 1, D) or what broadcasts to (M, L, D), added before a norm that stands before the first block.
        """
        raise NotImplementedError

    def norm_attention(self, index: int, x: Tensor) -> Tensor:
        """The norm before the attention of block `index`: (..., D) -> the same."""
        raise NotImplementedError

    def attention(self, index: int, x: Tensor, in_space: bool = True) -> Tensor:
        """The attention of block `index` on normed tokens, with all that follows it up to the residual sum.

        Args:
            x: (M, L, D). in_space: whether the tokens are those of an image, so that positions inside the block count.
        """
        raise NotImplementedError

    def norm_mlp(self, index: int, x: Tensor) -> Tensor:
        """The norm before the MLP of block `index`: (..., D) -> the same."""
        raise NotImplementedError

    def mlp(self, index: int, x: Tensor) -> Tensor:
        """The MLP of block `index` on normed tokens, up to the residual sum: (M, L, D) -> the same."""
        raise NotImplementedError

    def keep_norms(self) -> None:
        """Told by a method that uses the four parts; a tower that would merge a norm into what follows must not."""

    def attend(self, index: int, x: Tensor, queries: int | None = None) -> Tensor:
        """The attention half of block `index`, with its residual: (M, L, D) -> the same.

        With `queries`, only for the first tokens: (M, L, D) -> (M, queries, D).
        """
        return (x + self.attention(index, self.norm_attention(index, x)))[:, :queries]

    def transform(self, index: int, x: Tensor) -> Tensor:
        """The MLP half of block `index`, with its residual: (M, L, D) -> the same."""
        return x + self.mlp(index, self.norm_mlp(index, x))

    def run_block(self, index: int, x: Tensor) -> Tensor:
        """Block `index` without gradients, a few images at a time, so that its inner width never stands for all.

        (M, L, D) -> the same.
        """
        with torch.no_grad():
            parts = [self.transform(index, self.attend(index, part)) for part in x.split(CHUNK)]
            return parts[0] if len(parts) == 1 else torch.cat(parts)

    def forward(self, images: Tensor) -> Tensor:
        """All blocks, before the last norm: (M, 3, height, width) -> (M, L, D)."""
        x = self.embed(self.patchify(images))
        for index in range(len(self.blocks)):
            x = self.transform(index, self.attend(index, x))
        return x

    def require(self, feature: Feature, key: str) -> None:
        """Raise TowerError if the trunk lacks what `key` of the configuration asks for."""
        if feature == "class_token" and not self.has_class_token:
            raise TowerError(f"network.arch: {self.name} has no class token; set {key} to mean_tokens")

    def read(self, x: Tensor, feature: Feature) -> Tensor:
        """One vector an image, of what the last block gave: (M, L, D), or (M, 1, D) for the class token -> (M, D).

        `mean_tokens` is the mean over the class token, if there is one, and the patches; registers do not count.
        """
        if feature == "class_token":
            return self.final_norm(x[:, :1]).squeeze(1)
        x = self.final_norm(x)
        registers = x[:, self.has_class_token : self.prefix]
        if registers.shape[1] == 0:
            return x.mean(1)
        return (x.sum(1) - registers.sum(1)) / (x.shape[1] - registers.shape[1])

    def without_registers(self, x: Tensor, feature: Feature = "class_token") -> Tensor:
        """One token that stands for the image, then the patches: (M, L, D) -> (M, 1 + N, D).

        The class token, or, with `mean_tokens`, the mean of the patches.
        """
        if feature == "class_token":
            return x if self.prefix == 1 else torch.cat([x[:, :1], x[:, self.prefix :]], 1)
        patches = x[:, self.prefix :]
        return torch.cat([patches.mean(1, keepdim=True), patches], 1)
