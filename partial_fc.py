"""PartialFC: the classifier of millions of identities, its class centres sharded over ranks.

    embedding e_i, label y_i, class centre w_j:   cos_ij = <e_i/|e_i|, w_j/|w_j|>
    z_ij = s cos_ij,  z_iy = s margin(cos_iy),    loss = mean_i (logsumexp_j z_ij - z_iy)

Per step: gather the global batch, draw this rank's classes, take cosines with their centres,
apply the margin, and combine the softmax over ranks. The gradient contract: the loss is the
mean over the global batch on every rank, and `local_embeddings.grad` is the gradient of that
mean, without a factor of the world size.

An et al. 2022, "Killing Two Birds with One Stone" (arXiv:2203.15565); An et al. 2021,
"Partial FC" (arXiv:2010.05222).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import linear, normalize
from torch.optim.optimizer import register_optimizer_step_pre_hook

from head.collectives import gather_labels, gather_rows, largest, sharded_cross_entropy
from head.initial import fill_initial_centres
from head.row_update import RowUpdate
from head.sampling import ClassSample, draw_sample
from head.shard import class_range
from losses import CombinedMargin

PAD_LABEL = -(1 << 40)  # marks rows that only fill a ragged batch; no user's label
POISON_LABEL = PAD_LABEL - 1  # sent by a rank whose batch does not fit, so that all ranks stop


class PartialFC(nn.Module):
    """Margin softmax over sharded class centres, all of them or a sample per step.

    Args:
        margin: what happens to the target cosine (losses.py).
        embedding_size: D.
        num_classes: C over all ranks; more than the labels need is allowed.
        sample_rate: share r of each rank's classes per step, in [0, 1]; the batch's own
            classes are always in, 0 means those only.
        row_update: rule for the class centres (head/row_update.py), applied by `step`. None leaves
            an ordinary `weight.grad` for a torch.optim of yours, which is refused for r < 1:
            it would move rows that were not sampled.
        batch_size_per_rank: the largest batch any rank will bring. Smaller ones are padded,
            larger ones refused. None: ranks agree on it in every step, which costs one tiny
            collective and, on CUDA, a wait for the device.
        seed: of initial centres (with the class index) and of the sampling (with the rank).
        process_group: the ranks that share the classes; None means the default group, or no
            group at all when torch.distributed is not initialised.
        device, dtype: of the class centres; float32 or float64.

    Attributes:
        weight: [num_classes_local, D] parameter, this rank's class centres.
        class_range: `range` of the global classes they belong to.

    Raises:
        ValueError: an argument outside its domain.
    """

    def __init__(
        self,
        margin: CombinedMargin,
        embedding_size: int,
        num_classes: int,
        sample_rate: float = 1.0,
        *,
        row_update: RowUpdate | None = None,
        batch_size_per_rank: int | None = None,
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
        if not 0.0 <= sample_rate <= 1.0:
            raise ValueError(f"sample_rate={sample_rate!r}: a share in [0, 1] (1 uses all classes)")
        if not dtype.is_floating_point:
            raise ValueError(f"dtype={dtype}: class centres are floating point")
        if batch_size_per_rank is not None and batch_size_per_rank < 1:
            raise ValueError(f"batch_size_per_rank={batch_size_per_rank}: at least 1, or None")
        if process_group is None and dist.is_available() and dist.is_initialized():
            process_group = dist.group.WORLD
        self.world_size = dist.get_world_size(process_group) if process_group else 1
        self.rank = dist.get_rank(process_group) if process_group else 0
        self.group = process_group if self.world_size > 1 else None

        self.margin = margin
        self.embedding_size = embedding_size
        self.num_classes = num_classes
        self.sample_rate = float(sample_rate)
        self.row_update = row_update
        self.batch_size_per_rank = batch_size_per_rank
        self.seed = seed
        self.class_range = class_range(num_classes, self.rank, self.world_size)
        self.num_classes_local = len(self.class_range)

        self.weight = nn.Parameter(
            torch.empty(self.num_classes_local, embedding_size, device=device, dtype=dtype)
        )
        fill_initial_centres(self.weight, self.class_range.start, seed)
        self._sample: ClassSample | None = None  # of the optimizer step in progress
        self._sample_is_prepared = False
        self._samples_drawn = 0
        if self.sample_rate < 1.0:
            _refuse_plain_optimizers(self.weight)

    def forward(self, local_embeddings: Tensor, local_labels: Tensor) -> Tensor:
        """Mean loss over the global batch; the same number on every rank.

        Args:
            local_embeddings: [b, D] floating; b may differ between ranks and be 0 on some.
            local_labels: [b] integers in [0, num_classes).

        Returns:
            Scalar. Non-finite if an embedding is: the caller lets nothing move then.

        Raises:
            ValueError: shapes, dtypes or labels that do not fit. On CPUs every rank raises, also
                for another rank's batch. On CUDA, where looking would wait for the device, a
                label outside the range makes the loss NaN.
            RuntimeError: r < 1 and a second forward before `step`, without `prepare`.
        """
        problem = self._problem(local_embeddings, local_labels)
        if problem:
            local_embeddings = self.weight.new_zeros(1, self.embedding_size)
            local_labels = torch.full((1,), POISON_LABEL, device=self.weight.device)
        capacity = self._capacity(local_embeddings.shape[0])
        with torch.autocast(local_embeddings.device.type, enabled=False):
            embeddings, labels = gather_rows(  # [B, D], [B]
                local_embeddings.to(self.weight.dtype), local_labels.to(torch.int64), PAD_LABEL,
                capacity, self.group,
            )  # fmt: skip
            if problem:
                raise ValueError(problem)
            real = labels != PAD_LABEL
            unknown = real & ((labels < 0) | (labels >= self.num_classes))
            self._refuse_unknown_labels(labels, unknown, capacity)

            centres, target_column = self._sampled_centres(self._localise(labels))  # [S, D], [B]
            cosines = linear(normalize(embeddings), normalize(centres))  # [B, S]
            logits = self.margin.logits(cosines, target_column)  # [B, S]
            losses = sharded_cross_entropy(logits, target_column, self.group)  # [B]
            loss = torch.where(real, losses, 0.0).sum() / real.sum()
            return loss + torch.where(unknown.any(), torch.nan, 0.0)

    def prepare(self, local_label_batches: Sequence[Tensor]) -> None:
        """Draw the classes of one optimizer step ahead, from all its micro-batches' labels.

        Under gradient accumulation every micro-batch of a step must see the same sample, with
        the positives of all of them in it. Without accumulation this is not needed: `forward`
        draws from its own batch. Costs one all-gather of labels; nothing at r = 1.
        """
        if self.sample_rate >= 1.0:
            return
        local_labels = torch.cat([labels.to(torch.int64) for labels in local_label_batches])
        local_labels = local_labels.to(self.weight.device)
        if self.batch_size_per_rank is not None:
            capacity = len(local_label_batches) * self.batch_size_per_rank
        else:
            capacity = self._capacity(len(local_labels))
        labels = gather_labels(local_labels, PAD_LABEL, capacity, self.group)
        self._sample = self._draw(self._localise(labels))
        self._sample_is_prepared = True

    @torch.no_grad()
    def step(
        self, learning_rate: float, bad: Tensor | None = None, gradient_scale: Tensor | None = None
    ) -> None:
        """Move the class centres of this step by `weight.grad`, and forget it and the sample.

        Args:
            learning_rate: of this step, the backbone's.
            bad: boolean scalar on the device; where true no row and no state moves.
            gradient_scale: what a loss scaler multiplied the loss with; taken out here.

        Raises:
            RuntimeError: no update rule was given, or there is no gradient.
        """
        if self.row_update is None:
            raise RuntimeError(
                "this PartialFC has no update rule: pass row_update=SGDRows(...) or AdamWRows(...) "
                "(head.row_update), or step weight.grad with an optimizer of yours"
            )
        gradient = self.weight.grad
        if gradient is None:
            raise RuntimeError("no gradient: call loss.backward() before head.step()")
        rows = self._sample.classes if self._sample is not None else None
        if rows is not None:
            gradient = gradient[rows]
        if gradient_scale is not None:
            gradient = gradient / gradient_scale
        self.row_update.update_rows(self.weight, gradient, rows, learning_rate, bad)
        self.weight.grad = None
        self._sample, self._sample_is_prepared = None, False

    def get_extra_state(self) -> dict[str, Any]:
        """What the sampling needs to go on as if it had not been interrupted."""
        return {"samples_drawn": self._samples_drawn, "seed": self.seed}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take over `get_extra_state` of a saved head."""
        self._samples_drawn, self.seed = state["samples_drawn"], state["seed"]

    def extra_repr(self) -> str:
        return (
            f"embedding_size={self.embedding_size}, num_classes={self.num_classes} "
            f"(here {self.class_range.start}..{self.class_range.stop - 1}), "
            f"sample_rate={self.sample_rate:g}, {self.margin.describe()}"
        )

    # --- details ----------------------------------------------------------------------------

    def _sampled_centres(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Centres of this step's classes and each row's own column; `labels` as `_localise`."""
        if self.sample_rate >= 1.0:
            return self.weight, labels
        if not self._sample_is_prepared:
            if self.weight.grad is not None:
                raise RuntimeError(
                    "a second forward before head.step(): its classes would be another sample. "
                    "To accumulate gradients call head.prepare(labels of all micro-batches) first"
                )
            self._sample = self._draw(labels)
        assert self._sample is not None
        columns = self._sample.columns(labels)
        torch._assert_async(
            ((labels < 0) | (columns >= 0)).all(),
            "a label is not among the classes head.prepare() was told of",
        )
        return self.weight[self._sample.classes], columns

    def _draw(self, labels: Tensor) -> ClassSample:
        sample = draw_sample(
            labels, self.num_classes_local, self.sample_rate,
            seed=self.seed, rank=self.rank, step=self._samples_drawn,
        )  # fmt: skip
        self._samples_drawn += 1
        return sample

    def _localise(self, labels: Tensor) -> Tensor:
        """Global labels in this rank's numbering, -1 where the class lives elsewhere."""
        here = (labels >= self.class_range.start) & (labels < self.class_range.stop)
        return torch.where(here, labels - self.class_range.start, -1)

    def _capacity(self, rows: int) -> int:
        if self.batch_size_per_rank is not None:
            return self.batch_size_per_rank
        capacity = largest(rows, self.group, self.weight.device)
        if capacity == 0:
            raise ValueError("the global batch is empty: at least one rank must bring a row")
        return capacity

    def _problem(self, embeddings: Tensor, labels: Tensor) -> str:
        """What does not fit about this rank's batch, or an empty string."""
        limit = self.batch_size_per_rank
        if embeddings.dim() != 2 or embeddings.shape[1] != self.embedding_size:
            given, wanted = f"embeddings {list(embeddings.shape)}", f"[b, {self.embedding_size}]"
        elif not embeddings.dtype.is_floating_point:
            given, wanted = f"embeddings of {embeddings.dtype}", "a floating dtype"
        elif labels.dim() != 1 or labels.shape[0] != embeddings.shape[0]:
            given, wanted = f"labels {list(labels.shape)}", f"[{embeddings.shape[0]}]"
        elif labels.dtype.is_floating_point or labels.dtype == torch.bool:
            given, wanted = f"labels of {labels.dtype}", "an integer dtype"
        elif limit is not None and len(labels) > limit:
            given, wanted = f"{len(labels)} rows", f"at most batch_size_per_rank={limit}"
        else:
            return ""
        return f"rank {self.rank} brought {given}; needed: {wanted}"

    def _refuse_unknown_labels(self, labels: Tensor, unknown: Tensor, capacity: int) -> None:
        if labels.device.type != "cpu":
            return
        if bool((labels == PAD_LABEL).all()):
            raise ValueError("the global batch is empty: at least one rank must bring a row")
        if not bool(unknown.any()):
            return
        row = int(torch.nonzero(unknown)[0])
        rank, row_there = divmod(row, capacity)
        if labels[row] == POISON_LABEL:
            raise ValueError(f"rank {rank} brought a batch that does not fit; it says what")
        raise ValueError(
            f"label {int(labels[row])} in row {row_there} of rank {rank}'s batch: labels must be "
            f"in [0, {self.num_classes}); set num_classes to at least the largest label + 1, or "
            "mend the set"
        )


def _refuse_plain_optimizers(weight: nn.Parameter) -> None:
    """Let no torch.optim step `weight`: on a sampled head it would move unsampled rows."""
    weight.sampled_by_partial_fc = True  # type: ignore[attr-defined]
    global _refusal_is_registered
    if not _refusal_is_registered:
        register_optimizer_step_pre_hook(_refuse_sampled_weights)
        _refusal_is_registered = True


_refusal_is_registered = False


def _refuse_sampled_weights(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if getattr(parameter, "sampled_by_partial_fc", False):
                raise RuntimeError(
                    f"{type(optimizer).__name__} would move class centres that were not sampled "
                    "(weight decay, momentum): for sample_rate < 1 pass row_update=SGDRows(...) or "
                    "AdamWRows(...) to PartialFC and call head.step(learning_rate)"
                )
