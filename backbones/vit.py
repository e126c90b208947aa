"""Vision Transformer without a class token: every patch goes into the embedding, vit_t to vit_h.

The network is that of Dosovitskiy et al., "An Image is Worth 16x16 Words", 2021. Patches are masked
during training as in An et al., "Killing Two Birds with One Stone", 2022 (arcface_torch). Names and
shapes of the parameters are those of arcface_torch, so its published weights load unchanged.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from backbones.base import Backbone
from utils.errors import UserError


def _variant(width: int, depth: int, drop_path_rate: float, mask_ratio: float) -> dict[str, Any]:
    return {
        "embed_dim": width,
        "depth": depth,
        "num_heads": 8,
        "drop_path_rate": drop_path_rate,
        "mask_ratio": mask_ratio,
    }


# All have 8 heads and patches of 9 pixels. The names are the published ones, spelling included.
#
# The published code does not pass its mask ratio on: it always masks 0.1 where the ratio is not 0.
# Here the ratio is the one in the name. `mask_ratio=0.1` on a `..._mask_005` network trains as the
# published weights were trained. Nothing else depends on it, because inference never masks.
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "vit_t": _variant(256, 12, 0.1, 0.1),
    "vit_t_dp005_mask0": _variant(256, 12, 0.05, 0.0),
    "vit_s": _variant(512, 12, 0.1, 0.1),
    "vit_s_dp005_mask_0": _variant(512, 12, 0.05, 0.0),
    "vit_b": _variant(512, 24, 0.1, 0.1),
    "vit_b_dp005_mask_005": _variant(512, 24, 0.05, 0.05),
    "vit_l_dp005_mask_005": _variant(768, 24, 0.05, 0.05),
    "vit_h": _variant(1024, 48, 0.1, 0.0),
}


class DropPath(nn.Module):
    """Stochastic depth (Huang et al., 2016): drop a sample's branch with probability `rate`.

    Kept branches are divided by 1 - rate, so that the expectation does not change.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, branch: Tensor) -> Tensor:
        """Drop the branch [N, ...] of random samples in training mode."""
        if not self.training or self.rate == 0.0:
            return branch
        keep = 1.0 - self.rate
        shape = (branch.shape[0],) + (1,) * (branch.ndim - 1)  # one draw per sample
        return branch * (branch.new_empty(shape).bernoulli_(keep) / keep)


class Attention(nn.Module):
    """Multi-head self-attention, [N, L, D] -> [N, L, D]. As published, qkv has no bias."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """Mix the tokens [N, L, D] of each sample."""
        qkv = self.qkv(tokens).unflatten(2, (3, self.num_heads, -1))  # [N, L, 3, H, D / H]
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each [N, H, L, D / H]
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.proj(mixed.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two linear layers with ReLU6 between them and hidden width 4 D, [N, L, D] -> [N, L, D]."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.act = nn.ReLU6()
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map each token of [N, L, D] on its own."""
        return self.fc2(self.act(self.fc1(tokens)))


class Block(nn.Module):
    """Pre-norm transformer block, [N, L, D] -> [N, L, D]."""

    def __init__(self, dim: int, num_heads: int, drop_path_rate: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.attn = Attention(dim, num_heads)
        self.drop_path = DropPath(drop_path_rate)
        self.mlp = Mlp(dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """Apply attention and MLP, each with a shortcut, to tokens [N, L, D]."""
        tokens = tokens + self.drop_path(self.attn(self.norm1(tokens)))
        return tokens + self.drop_path(self.mlp(self.norm2(tokens)))


class PatchEmbed(nn.Module):
    """Patch embedding: images [N, C, S, S] -> tokens [N, (S // patch)^2, D].

    Pixels beyond the last whole patch are not used.
    """

    def __init__(self, patch_size: int, in_channels: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        """Map images [N, C, S, S] to tokens."""
        return self.proj(images).flatten(2).transpose(1, 2)


class VisionTransformer(Backbone):
    """ViT whose embedding is a fully connected layer over all patch tokens.

    With 112 pixels and patches of 9, as published, there are 12 x 12 patches, and the last 4 rows
    and columns of pixels are not used.

    Args:
        embed_dim: Width D of the tokens.
        depth: Number of blocks.
        num_heads: Attention heads. The number must divide `embed_dim`.
        patch_size: Height and width of a patch in pixels.
        drop_path_rate: Stochastic depth of the last block. The rate grows linearly from 0 at the
            first block.
        mask_ratio: Fraction of the patches that are masked in a training sample. A learned token
            fills their places in the output.
        num_features: Size of the embedding.
        dropout: Must be 0, because the published networks have no dropout.
        input_size: Height and width of the images in pixels.
        in_channels: Channels of the images.
        gradient_checkpointing: Whether training recomputes activations in backward.

    Raises:
        UserError: One of these values does not fit. The message says which.
    """

    OPTIONS: ClassVar[tuple[str, ...]] = (
        "embed_dim",
        "depth",
        "num_heads",
        "patch_size",
        "drop_path_rate",
        "mask_ratio",
    )
    EMBEDDING_KEY: ClassVar[str] = "feature.3.weight"
    STEM_KEY: ClassVar[str] = "patch_embed.proj.weight"

    def __init__(
        self,
        embed_dim: int,
        depth: int,
        num_heads: int,
        *,
        patch_size: int = 9,
        drop_path_rate: float = 0.0,
        mask_ratio: float = 0.0,
        num_features: int = 512,
        dropout: float = 0.0,
        input_size: int = 112,
        in_channels: int = 3,
        gradient_checkpointing: bool = False,
    ) -> None:
        if dropout:
            raise UserError(f"dropout={dropout}, but the ViT has no dropout layer: pass 0")
        if embed_dim % num_heads:
            raise UserError(f"embed_dim={embed_dim} is not a multiple of num_heads={num_heads}")
        if not 1 <= patch_size <= input_size:
            raise UserError(f"patch_size={patch_size} must lie in 1..input_size={input_size}")
        for option, rate in (("drop_path_rate", drop_path_rate), ("mask_ratio", mask_ratio)):
            if not 0 <= rate < 1:
                raise UserError(f"{option}={rate} must be at least 0 and below 1")
        super().__init__(num_features, input_size, in_channels, gradient_checkpointing)
        num_patches = (input_size // patch_size) ** 2
        if int(num_patches * (1 - mask_ratio)) < 1:
            raise UserError(f"mask_ratio={mask_ratio} leaves none of {num_patches} patches")
        self.mask_ratio = mask_ratio
        self.patch_embed = PatchEmbed(patch_size, in_channels, embed_dim)
        self.pos_embed = nn.Parameter(torch.empty(1, num_patches, embed_dim))
        # Without masking the token has no gradient, and DDP must not wait for one.
        self.mask_token = nn.Parameter(torch.empty(1, 1, embed_dim), requires_grad=mask_ratio > 0)
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, drop_path_rate * index / max(1, depth - 1))
            for index in range(depth)
        )
        self.norm = nn.LayerNorm(embed_dim)
        self.feature = nn.Sequential(
            nn.Linear(embed_dim * num_patches, embed_dim, bias=False),
            nn.BatchNorm1d(embed_dim, eps=2e-5),
            nn.Linear(embed_dim, num_features, bias=False),
            nn.BatchNorm1d(num_features, eps=2e-5),
        )
        self._initialize()

    def _initialize(self) -> None:
        """Initialize as published: linear layers and positions truncated normal 0.02, biases 0."""
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.normal_(self.mask_token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def layers_by_depth(self) -> list[tuple[str, ...]]:
        """Return the patches with their positions, every block, and the embedding layer.

        This is the order of Bao et al., "BEiT", 2022. The mask token is inserted after the blocks,
        so it belongs to the last group.
        """
        blocks = [(f"blocks.{block}",) for block in range(len(self.blocks))]
        return [("patch_embed", "pos_embed"), *blocks, ("norm", "mask_token", "feature")]

    def forward_features(self, images: Tensor) -> Tensor:
        """Map images [N, C, S, S] to all tokens, flattened, [N, patches * embed_dim]."""
        self._check_images(images)
        tokens = self.patch_embed(images) + self.pos_embed
        order = None
        if self.training and self.mask_ratio > 0:
            tokens, order = _drop_patches(tokens, self.mask_ratio)
        for block in self.blocks:
            tokens = self._run(block, tokens)
        tokens = self.norm(tokens)
        if order is not None:
            tokens = _restore_patches(tokens, self.mask_token, order)
        return tokens.flatten(1)

    def forward_embedding(self, features: Tensor) -> Tensor:
        """Map the flattened tokens of `forward_features` to embeddings [N, num_features]."""
        return self.feature(features)


def _drop_patches(tokens: Tensor, ratio: float) -> tuple[Tensor, Tensor]:
    """Keep a random int(L * (1 - ratio)) of each sample's L tokens.

    Args:
        tokens: All tokens, [N, L, D].
        ratio: Fraction of the tokens to drop.

    Returns:
        The kept tokens [N, kept, D], and for each sample a random order [N, L] of all tokens that
        begins with those kept.
    """
    samples, length, width = tokens.shape
    order = torch.rand(samples, length, device=tokens.device).argsort(dim=1)
    kept = order[:, : int(length * (1 - ratio)), None].expand(-1, -1, width)
    return tokens.gather(1, kept), order


def _restore_patches(kept: Tensor, mask_token: Tensor, order: Tensor) -> Tensor:
    """Put tokens [N, kept, D] back in their places of [N, L, D]; `mask_token` fills the others."""
    samples, length = order.shape
    fill = mask_token.expand(samples, length - kept.shape[1], -1)
    place = order.argsort(dim=1)[:, :, None].expand(-1, -1, kept.shape[2])
    return torch.cat([kept, fill], dim=1).gather(1, place)
