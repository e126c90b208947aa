"""The last layer of plain classification as a head of the trainer: y = W x + b and its softmax.

    parallel_dim   weight on each rank    logits                    gradient of the weight
    None           whole                  own rows, all classes     all-reduced
    0              [C, D / n]             all rows, all-reduced     own features
    1, -1          [C / n, D]             all rows, own classes     own classes

`SplitClassifier` is PartialFC without a margin. It serves the last line of the table, with bounded
memory, sampling, and class centers that are updated in backward. `LayerClassifier` uses the layers
of arcshard/parallel/, with logits and gradients by autograd. It serves all lines, and has label
smoothing. Both start from the same weights for every split, keep PartialFC's gradient contract, and
use the same names for their state, so that a checkpoint of one can be resumed with the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import linear

from arcshard.head.batch import PAD_LABEL, BatchGatherer
from arcshard.head.cross_entropy import Spread, sharded_cross_entropy
from arcshard.head.init import init_centers
from arcshard.head.ranking import target_rank
from arcshard.head.row_optimizer import RowOptimizer
from arcshard.losses import Softmax
from arcshard.parallel.collectives import reduce
from arcshard.parallel.groups import resolve_group
from arcshard.parallel.loss import local_columns
from arcshard.parallel.split import ParallelDim, Split, check_dim, size_of
from arcshard.parallel.state_dict import whole_on_first_rank
from arcshard.partial_fc import PartialFC


class SplitClassifier(PartialFC):
    """PartialFC with a plain softmax (`Softmax` margin). The arguments are those of PartialFC."""

    def forward(
        self, local_embeddings: Tensor, local_labels: Tensor, learning_rate: float | None = None
    ) -> Tensor:
        """Compute the loss as PartialFC does; `mean_pairwise_cosine` stays None.

        Features behind a ReLU all point in similar directions, and this loss does not depend on
        cosines.
        """
        loss = super().forward(local_embeddings, local_labels, learning_rate)
        self.mean_pairwise_cosine = None
        return loss

    def target_rank(self, local_embeddings: Tensor, local_labels: Tensor) -> Tensor:
        """Return the number of classes that score above each row's own, int64 [b].

        All ranks call this together.
        """
        rules = BatchGatherer(self.embedding_size, self.num_classes, None, self.rank, self.group)
        return _rank_of_targets(self, rules, local_embeddings, local_labels)


class LayerClassifier(nn.Module):
    """Softmax cross-entropy over a linear layer that is whole, or split by features or classes.

    Args:
        embedding_size: D.
        num_classes: C.
        dim: The `parallel_dim` of the table above.
        bias: Whether every class has a bias.
        label_smoothing: Fraction of the target that is spread evenly over all classes, in [0, 1].
        row_optimizer: Optimizer of the weight.
        bias_update: Optimizer of the bias.
        batch_size_per_rank: Largest batch that any rank brings. With None the ranks agree on it in
            every step.
        half: dtype of the matmul's operands (torch.bfloat16). None takes that of the parameters.
        seed: Seed of the initial weights, which also depend on the class index.
        process_group: The ranks of the run; None for the default group.
        device: Device of the parameters.
        dtype: float64 makes the parameters float64; with every other dtype they are float32.

    Attributes:
        weight: This rank's part of the weight.
        bias: This rank's part of the bias, or None.
        class_range: The classes of its rows.
        mean_pairwise_cosine: Always None; see SplitClassifier.
        fused: Always None, as in PartialFC with update="autograd".

    Raises:
        ValueError: An argument is outside its domain.
    """

    centers_per_class = 1
    mean_pairwise_cosine: Tensor | None = None
    fused = None

    def __init__(
        self,
        embedding_size: int,
        num_classes: int,
        dim: ParallelDim,
        *,
        bias: bool = True,
        label_smoothing: float = 0.0,
        row_optimizer: RowOptimizer,
        bias_update: RowOptimizer,
        batch_size_per_rank: int | None = None,
        half: torch.dtype | None = None,
        seed: int = 0,
        process_group: dist.ProcessGroup | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if embedding_size < 1 or num_classes < 1:
            raise ValueError(
                f"embedding_size={embedding_size}, num_classes={num_classes}: at least 1 each"
            )
        if not 0.0 <= label_smoothing <= 1.0:
            raise ValueError(f"label_smoothing={label_smoothing!r}: a share in [0, 1]")
        self.dim = check_dim(dim, "input features", "output features")
        group = resolve_group(process_group)
        self.world_size, self.group = size_of(group), group if size_of(group) > 1 else None
        self.rank = 0 if self.group is None else dist.get_rank(self.group)
        self.embedding_size, self.num_classes = embedding_size, num_classes
        self.label_smoothing, self.seed = float(label_smoothing), seed
        self.margin = Softmax(bias=bias)
        self.device = torch.device(device)
        self.work_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        self.matmul_dtype = self.work_dtype if half is None else half
        self._rules = BatchGatherer(
            embedding_size, num_classes, batch_size_per_rank, self.rank, self.group
        )
        sizes = (num_classes, embedding_size)
        self.split = None if self.dim is None else Split(1 - self.dim, sizes[1 - self.dim], group)
        self.class_range = self.split.mine if self.split and self.dim == 1 else range(num_classes)
        self.features = self.split.mine if self.split and self.dim == 0 else range(embedding_size)
        self.num_classes_local = len(self.class_range)

        shape = (self.num_classes_local, len(self.features))
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=self.work_dtype))
        init_centers(self.weight, self.class_range.start, seed, self.features, embedding_size)
        self.bias: nn.Parameter | None = None
        if bias:
            self.bias = nn.Parameter(torch.zeros(shape[0], device=device, dtype=self.work_dtype))
        self.row_optimizer, self._bias_optimizer = row_optimizer, bias_update

    def forward(
        self, local_embeddings: Tensor, local_labels: Tensor, learning_rate: float | None = None
    ) -> Tensor:
        """Compute the mean loss over the global batch, which is the same number on every rank.

        Arguments and errors are those of PartialFC. The weights are updated only in `step`.
        """
        with torch.autocast(local_embeddings.device.type, enabled=False):
            embeddings, labels = local_embeddings.to(self.work_dtype), local_labels
            if self.dim is None:
                everyone, has_unknown = self._rules.gather_labels(embeddings, labels)
                is_real = torch.ones_like(labels, dtype=torch.bool)
            else:
                batch = self._rules.gather(embeddings, labels, self.work_dtype)
                embeddings, labels, is_real = batch.embeddings, batch.labels, batch.is_real
                everyone, has_unknown = labels, batch.has_unknown
            count = (everyone != PAD_LABEL).sum()
            rows = self.row_losses(embeddings, labels)  # [B], or [b] of the own rows
            loss = (rows * is_real).sum() / count
            if self.dim is None and self.group is not None:
                loss = reduce(loss, self.group)
            return loss + torch.where(has_unknown, torch.nan, 0.0)

    def row_losses(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Compute the losses [B] of gathered embeddings [B, D] and labels [B].

        With a whole weight the rows are those of this rank.
        """
        return sharded_cross_entropy(
            self._logits(embeddings),
            local_columns(labels, self.class_range),
            self.group if self.dim == 1 else None,
            embeddings.new_full(labels.shape, 1.0 - self.label_smoothing),
            self._spread(),
        )

    def _logits(self, embeddings: Tensor) -> Tensor:
        """Compute this rank's logits [B, C_local] of embeddings [B, D]."""
        mine = embeddings[:, self.features.start : self.features.stop]
        operands = mine.to(self.matmul_dtype), self.weight.to(self.matmul_dtype)
        logits = linear(*operands).to(self.work_dtype)
        if self.dim == 0 and self.group is not None:
            logits = reduce(logits, self.group)
        return logits if self.bias is None else logits + self.bias

    def _spread(self) -> Spread | None:
        if not self.label_smoothing:
            return None
        return Spread(self.label_smoothing / self.num_classes, None, float(self.num_classes))

    def prepare(self, local_label_batches: Sequence[Tensor]) -> None:
        """Do nothing, because all classes take part in every step."""

    @torch.no_grad()
    def step(
        self, learning_rate: float, bad: Tensor | None = None, gradient_scale: Tensor | None = None
    ) -> None:
        """Update weight and bias by their gradients; the arguments are those of PartialFC.

        Raises:
            RuntimeError: There is no gradient.
        """
        for parameter, rule in self.optimized_parameters():
            gradient = parameter.grad
            if gradient is None:
                raise RuntimeError("no gradient: call loss.backward() before head.step()")
            if self.dim is None and self.group is not None:
                dist.all_reduce(gradient, group=self.group)  # each rank had its own rows
            if gradient_scale is not None:
                gradient = gradient / gradient_scale
            if parameter.numel():
                rule.update_rows(parameter, gradient, None, learning_rate, bad)
            rule.end_step()
            parameter.grad = None

    def optimized_parameters(self) -> list[tuple[nn.Parameter, RowOptimizer]]:
        """Return each parameter with the optimizer that owns its state."""
        pairs = ((self.weight, self.row_optimizer), (self.bias, self._bias_optimizer))
        return [(parameter, rule) for parameter, rule in pairs if parameter is not None]

    def get_extra_state(self) -> dict[str, Any]:
        """Return the keys of PartialFC's state; the counts of random draws are 0 here."""
        return {
            "samples_drawn": 0,
            "forwards": 0,
            "seed": self.seed,
            "roundings": [rule.sr_counter for _, rule in self.optimized_parameters()],
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore what `get_extra_state` of a saved head returned."""
        self.seed = state["seed"]
        for (_, rule), count in zip(self.optimized_parameters(), state["roundings"], strict=True):
            rule.sr_counter = count

    def describe_memory(self) -> str:
        """Describe what the head holds on this rank, for the log."""
        state = self.row_optimizer.state(self.weight).values()
        size = sum(t.numel() * t.itemsize for t in (self.weight, *state)) / 2**20
        kind = {None: "whole", 0: "split by features", 1: "split by classes"}[self.dim]
        return f"weight {kind}, with state {size:,.0f} MiB; logits and gradients by autograd"

    def target_rank(self, local_embeddings: Tensor, local_labels: Tensor) -> Tensor:
        """Return the ranks as SplitClassifier does; a whole weight needs no other process."""
        rules = BatchGatherer(self.embedding_size, self.num_classes, None, self.rank, self.group)
        return _rank_of_targets(self, rules, local_embeddings, local_labels)


Head = PartialFC | LayerClassifier


@torch.no_grad()
def _rank_of_targets(
    head: SplitClassifier | LayerClassifier,
    rules: BatchGatherer,
    embeddings: Tensor,
    labels: Tensor,
) -> Tensor:
    """Return the ranks [b] of this process's targets among all classes."""
    embeddings, labels = embeddings.to(head.device, head.work_dtype), labels.to(head.device)
    dim = head.dim if isinstance(head, LayerClassifier) else 1
    if dim is None or head.group is None:
        return target_rank(embeddings, labels, head.weight, head.bias, 0, None)
    batch = rules.gather(embeddings, labels, head.work_dtype)
    if dim == 1:
        places = target_rank(
            batch.embeddings,
            batch.labels,
            head.weight,
            head.bias,
            head.class_range.start,
            head.group,
        )
    else:
        assert isinstance(head, LayerClassifier)
        mine = batch.embeddings[:, head.features.start : head.features.stop]
        places = target_rank(mine, batch.labels, head.weight, head.bias, 0, None, head.group)
    first = head.rank * (len(batch.labels) // head.world_size)
    return places[first : first + len(labels)]


def whole_classifier(head: Head) -> dict[str, Tensor]:
    """Collect weight [C, D] and bias [C] in host memory on the first rank; all ranks call this.

    Returns:
        The tensors by name on the first rank, and {} elsewhere. They are views of the parameters
        where those are whole and in host memory already.

    Raises:
        ValueError: The head has several centers per class, so it is not a linear layer.
    """
    if head.centers_per_class > 1:
        raise ValueError(f"{head.centers_per_class} centers per class are no linear layer")
    whole: dict[str, Tensor] = {}
    for name, part in (("weight", head.weight), ("bias", head.bias)):
        if part is None:
            continue
        split = _split_of(head, name)
        joined = part.detach().cpu() if split is None else whole_on_first_rank(part, split)
        if joined is not None and head.rank == 0:
            whole[name] = joined
    return whole


def _split_of(head: Head, name: str) -> Split | None:
    """Return how a parameter of a head is split, None if it is whole."""
    if isinstance(head, LayerClassifier):
        return head.split if name == "weight" or head.dim == 1 else None
    return None if head.group is None else Split(0, head.num_classes, head.group)
