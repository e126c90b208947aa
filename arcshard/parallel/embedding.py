"""A table of embeddings that is split over ranks, by rows (vocabulary) or by features."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import embedding

from arcshard.parallel.collectives import gather_split, reduce
from arcshard.parallel.groups import resolve_group
from arcshard.parallel.split import (
    ParallelDim,
    Split,
    check_dim,
    check_sizes,
    fill_split,
    local_part,
    mark_split,
    register_parallel_dim,
)


class ParallelEmbedding(nn.Module):
    """Rows of a table [num_embeddings, embedding_dim] by index, as nn.Embedding.

    Args:
        num_embeddings: Number of rows of the whole table.
        embedding_dim: Number of features of the whole table.
        padding_idx: Row that gets no gradient and starts as zero, or None; as in nn.Embedding.
        dim: None for replicated. 0 for row parallel: the vocabulary is split, every rank returns
            zeros for rows that it does not own, and one all-reduce sums them. 1 or -1 for column
            parallel: the features are split.
        gather_output: Whether every rank gets all features (one all-gather); for dim=1 only.
        process_group: Ranks that share the table; None for the default group.
        device: Device of the table.
        dtype: Dtype of the table.

    Attributes:
        weight: The table, a DTensor where several ranks share it.

    Raises:
        ValueError: `dim`, a size or `padding_idx` is outside its domain, or `gather_output` is set
            without dim=1.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        dim: ParallelDim = None,
        *,
        gather_output: bool = False,
        process_group: dist.ProcessGroup | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes(num_embeddings=num_embeddings, embedding_dim=embedding_dim)
        self.dim = check_dim(dim, "rows", "features")
        if gather_output and self.dim != 1:
            raise ValueError(f"gather_output=True with dim={dim!r}: only dim=1 leaves parts")
        if padding_idx is not None and not -num_embeddings <= padding_idx < num_embeddings:
            raise ValueError(
                f"padding_idx={padding_idx}: in [-{num_embeddings}, {num_embeddings}), or None"
            )
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.padding_idx = None if padding_idx is None else padding_idx % num_embeddings
        self.gather_output = gather_output

        shape = [num_embeddings, embedding_dim]
        self.split: Split | None = None
        if self.dim is not None:
            self.split = Split(self.dim, shape[self.dim], resolve_group(process_group))
            shape[self.dim] = len(self.split.mine)
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        if self.split is not None:
            register_parallel_dim(self, "weight", self.split)
        self.reset_parameters()

    @property
    def rows(self) -> range:
        """Rows of the whole table that this rank owns."""
        return self.split.mine if self.split and self.dim == 0 else range(self.num_embeddings)

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The ranks that share the layer, None where it is not split."""
        return None if self.split is None else self.split.group

    def reset_parameters(self) -> None:
        """Draws nn.Embedding's initial values, whatever the split, with zeros at `padding_idx`."""

        def draw(shape: Sequence[int], generator: torch.Generator) -> Tensor:
            return torch.randn(shape, generator=generator)

        fill_split(self.weight, self.split, draw)
        if self.padding_idx is not None and self.padding_idx in self.rows:
            local_part(self.weight.detach())[self.padding_idx - self.rows.start].zero_()

    def forward(self, indices: Tensor) -> Tensor:
        """Looks up integers [...], as [..., embedding_dim] or this rank's features of it.

        Raises:
            ValueError: An index is outside [0, num_embeddings) (on CUDA it is a device assertion).
        """
        self._check(indices)
        weight = local_part(self.weight)
        if self.dim != 0:
            y = embedding(indices, weight, self.padding_idx)
            split = self.split and Split(y.ndim - 1, self.embedding_dim, self.group)
            if split is not None and self.gather_output:
                y, split = gather_split(y, split), None
            return mark_split(y, split)

        start, stop = self.rows.start, self.rows.stop
        if start == stop:
            # The empty sum connects y to autograd, so that a rank without rows takes part in
            # backward's collectives like the others.
            y = weight.new_zeros(*indices.shape, self.embedding_dim) + weight.sum()
        else:
            here = (indices >= start) & (indices < stop)
            padding = None
            if self.padding_idx is not None and self.padding_idx in self.rows:
                padding = self.padding_idx - start
            y = embedding((indices - start).clamp(0, stop - start - 1), weight, padding)
            y = y.masked_fill(~here[..., None], 0.0)
        return mark_split(reduce(y, self.group), None)

    def _check(self, indices: Tensor) -> None:
        fits = (indices >= 0) & (indices < self.num_embeddings)
        if indices.device.type != "cpu":
            torch._assert_async(fits.all(), "ParallelEmbedding: an index is outside the table")
        elif not fits.all():
            place = int((~fits).flatten().nonzero()[0])
            raise ValueError(
                f"index {int(indices.flatten()[place])} (number {place} of the input) is outside "
                f"[0, {self.num_embeddings}): correct the input or enlarge num_embeddings"
            )

    def extra_repr(self) -> str:
        """Returns the text in the parentheses of print(model)."""
        return f"{self.num_embeddings}, {self.embedding_dim}, dim={self.dim}"
