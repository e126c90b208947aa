"""PartialFC: a classifier of millions of identities, its class centers sharded over ranks.

    embedding e_i, label y_i, class center w_j:   cos_ij = <e_i/|e_i|, w_j/|w_j|>
    z_ij = s cos_ij,  z_iy = s margin(cos_iy),    loss = mean_i (logsumexp_j z_ij - z_iy)

Each step gathers the global batch, draws this rank's classes, computes what the margin needs of the
batch, and combines the softmax over ranks. Two paths share all this and differ in the middle:

    update="fused"     arcshard/head/fused.py: blocks of classes, without a B x C matrix or a
                       C x D gradient; class centers are updated in backward or in `step`
    update="autograd"  the reference path (arcshard/head/reference.py): an ordinary `weight.grad`

The gradient contract: the loss is the mean over the global batch on every rank, and
`local_embeddings.grad` is the gradient of that mean, without a factor of the world size.

An et al. 2022, "Killing Two Birds with One Stone" (arXiv:2203.15565); An et al. 2021, "Partial FC"
(arXiv:2010.05222).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from arcshard.collectives import gather_labels, sum_over_ranks
from arcshard.deprecation import renamed_arguments
from arcshard.head.batch import PAD_LABEL, BatchGatherer, GlobalBatch, mean_pairwise_cosine
from arcshard.head.block import NORM_FLOOR, is_finite, without_autocast
from arcshard.head.centers import ClassCenters
from arcshard.head.fused import FusedMarginSoftmax, update_centers
from arcshard.head.init import init_centers
from arcshard.head.kernels import MODES, KernelMode, why_not
from arcshard.head.offload import CenterOffload, OffloadedCenters
from arcshard.head.reference import reference_loss
from arcshard.head.row_optimizer import RowOptimizer, refuse_plain_optimizers
from arcshard.head.sampling import columns_of, draw_sample, sample_size
from arcshard.head.step import SoftmaxInputs, StepContext
from arcshard.head.target import PositiveLogits, find_positive_logits
from arcshard.head.workspace import (
    FusedSettings,
    Plan,
    choose_workspace,
    memory_bytes_of,
)
from arcshard.losses import BatchFacts, Margin
from arcshard.margins.base import Context, refuse
from arcshard.random import hash_key
from arcshard.shard import class_range

UpdateMode = Literal["fused", "autograd"]


class PartialFC(nn.Module):
    """Margin softmax over sharded class centers, all of them or a sample per step.

    Args:
        margin: The loss (losses.py).
        embedding_size: D.
        num_classes: C over all ranks; more than the labels need is allowed.
        sample_rate: Share r of each rank's classes per step, in [0, 1]. The batch's own classes are
            always included; 0 means only those.
        row_optimizer: Optimizer of the class centers (arcshard/head/row_optimizer.py).
        update: "fused" updates the centers by `row_optimizer` without holding their whole gradient.
            "autograd" leaves an ordinary `weight.grad`, for `step` or for a torch.optim of your own
            (refused for r < 1, because it would update rows that were not sampled). None is "fused"
            if there is a `row_optimizer`, else "autograd".
        batch_size_per_rank: The largest batch of any rank. Smaller batches are padded, larger ones
            refused. With None the ranks agree on it in every step, which costs one tiny collective
            and, on CUDA, a wait for the device.
        centers_per_class: K sub-centers; a class counts with its best one (Deng et al. 2020).
        workspace_mib: Memory of the fused path in MiB, beside the centers, their state and O(B D).
            "auto" is an eighth of a GPU's memory, or less where all softmax numerators are kept
            with less, and 256 MiB on a CPU.
        half: torch.bfloat16 as the dtype of the large matmuls, which the fused path sums in fp32.
            None for full precision.
        seed: Seed of initial centers (with the class index), sampling (with the rank) and draws.
        process_group: Ranks that share the classes. None is the default group, or no group when
            torch.distributed is not initialized.
        device: Device where the head computes.
        dtype: Dtype of the class centers: float32, float64, or bfloat16 (updated in fp32 and
            rounded stochastically; fused only).
        center_device: Device of the centers and their state, if it is not `device`. "cpu" keeps
            them in host memory and copies the sampled rows to the device (r < 1, fused).
        kernels: "auto" lets Triton kernels do what is not a plain product, on CUDA devices of
            compute capability 8.0 or higher with bf16 products. Where they cannot, and with
            "torch", PyTorch does it; `describe_kernels` says which and why. "triton" is "auto", and
            on a CPU takes Triton's interpreter where TRITON_INTERPRET=1 is set, for tests.

    Attributes:
        weight: [num_classes_local * K, D] parameter, this rank's class centers, class-major.
        bias: [num_classes_local * K] parameter, or None for a margin without bias.
        class_range: `range` of the global classes of this rank.
        work_dtype: Dtype of the computation: float32, or float64 with float64 centers.
        mean_pairwise_cosine: Scalar in [0, 1] of the last global batch, 1 if all its embeddings
            have the same direction; None before the first batch.

    Raises:
        ValueError: An argument is outside its domain, or the workspace is too small for one class.
    """

    @renamed_arguments(
        row_update="row_optimizer",
        centres_per_class="centers_per_class",
        centre_device="center_device",
    )
    def __init__(
        self,
        margin: Margin,
        embedding_size: int,
        num_classes: int,
        sample_rate: float = 1.0,
        *,
        row_optimizer: RowOptimizer | None = None,
        update: UpdateMode | None = None,
        batch_size_per_rank: int | None = None,
        centers_per_class: int = 1,
        workspace_mib: float | str = "auto",
        half: torch.dtype | None = None,
        seed: int = 0,
        process_group: dist.ProcessGroup | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        center_device: torch.device | str | None = None,
        kernels: KernelMode = "auto",
    ) -> None:
        super().__init__()
        update = update or ("autograd" if row_optimizer is None else "fused")
        if process_group is None and dist.is_available() and dist.is_initialized():
            process_group = dist.group.WORLD
        self.world_size = dist.get_world_size(process_group) if process_group else 1
        self.rank = dist.get_rank(process_group) if process_group else 0
        self.group = process_group if self.world_size > 1 else None
        self.device = torch.device(device)

        self.margin, self.row_optimizer, self.update = margin, row_optimizer, update
        self.embedding_size, self.num_classes, self.seed = embedding_size, num_classes, seed
        self.sample_rate, self.centers_per_class = float(sample_rate), centers_per_class
        self.batch_size_per_rank, self.matmul_half = batch_size_per_rank, half
        self._check(workspace_mib, dtype, center_device, kernels)
        self.class_range = class_range(num_classes, self.rank, self.world_size)
        self.num_classes_local = len(self.class_range)
        self._gatherer = BatchGatherer(
            embedding_size, num_classes, batch_size_per_rank, self.rank, self.group
        )
        self.work_dtype = torch.float64 if dtype == torch.float64 else torch.float32

        lives_on = self.device if center_device is None else center_device
        rows = self.num_classes_local * centers_per_class
        self.weight = nn.Parameter(torch.empty(rows, embedding_size, device=lives_on, dtype=dtype))
        init_centers(self.weight, self.class_range.start * centers_per_class, seed)
        self.bias: nn.Parameter | None = None
        if margin.bias:
            self.bias = nn.Parameter(torch.zeros(rows, device=lives_on, dtype=self.work_dtype))
        self._bias_optimizer = copy.deepcopy(row_optimizer) if margin.bias else None
        for name, value in margin.initial_state().items():
            state = torch.tensor(value, dtype=self.work_dtype, device=self.device)
            self.register_buffer(f"margin_{name}", state)
        self._identify_rules()
        self._no_kernels = ""  # the reason why there are no Triton kernels
        self.fused: FusedSettings | None = None
        if update == "fused":
            workspace = choose_workspace(
                workspace_mib, self.device.type, memory_bytes_of(self.device)
            )
            operand_dtype = half if half and self.work_dtype == torch.float32 else self.work_dtype
            dtypes = (self.work_dtype, operand_dtype)
            about = (self.device, operand_dtype, embedding_size, row_optimizer, dtype)
            self._no_kernels = why_not(kernels, *about)
            has_kernels = not self._no_kernels
            self.fused = FusedSettings(
                margin, self.group, workspace, self.device, *dtypes, centers_per_class, has_kernels
            )
            refuse_plain_optimizers(self.weight, "update='fused' moves its class centers itself")
        elif self.sample_rate < 1.0:
            refuse_plain_optimizers(
                self.weight,
                "it would move class centers that were not sampled (weight decay, momentum): for "
                "sample_rate < 1 pass row_optimizer=SGDRows(...) or AdamWRows(...) and "
                "call head.step(learning_rate)",
            )
        self._host: CenterOffload | None = None
        if center_device is not None and row_optimizer is not None:
            self._host = CenterOffload(self.weight, row_optimizer, self.device)
        self._step: StepContext | None = None  # the optimizer step in progress
        self._was_updated = False  # in backward, before it and since the last call of `step`
        self.mean_pairwise_cosine: Tensor | None = None
        self._samples_drawn = self._forwards = 0
        if self.fused is not None and batch_size_per_rank is not None:
            self.planned_blocks()  # raises if the workspace does not hold one class

    def forward(
        self,
        local_embeddings: Tensor,
        local_labels: Tensor,
        learning_rate: float | None = None,
    ) -> Tensor:
        """Computes the mean loss over the global batch, the same number on every rank.

        Args:
            local_embeddings: [b, D] floating embeddings; b may differ between ranks and be 0 on
                some.
            local_labels: [b] integers in [0, num_classes).
            learning_rate: With it the fused path updates the class centers in backward, which saves
                a pass over them; the reference path ignores it. It is for steps that have this one
                loss and that can no longer be skipped. With None the centers are updated in `step`.

        Returns:
            Scalar. It is non-finite if an embedding is; then no class center is updated.

        Raises:
            ValueError: Shapes, dtypes or labels do not fit. On CPUs every rank raises, also for the
                batch of another rank. On CUDA, where checking labels would wait for the device,
                only the rank with a wrong shape or dtype raises (torchrun then ends the others),
                and a label outside the range makes the loss NaN.
                A label that `prepare` was not given is treated in the same way.
            RuntimeError: r < 1, and a gradient of an earlier forward still waits for `step`,
                without `prepare`.
        """
        with without_autocast(local_embeddings.device):
            batch = self._gatherer.gather(
                local_embeddings.to(self.device), local_labels.to(self.device), self.work_dtype
            )
            step = self._step_of(batch.labels)
            inputs, after = self._inputs(batch, step)
            if self.fused is not None:
                keeps = torch.is_grad_enabled() and not step.is_evaluation
                settings = (self.weight, self.fused, step, inputs, learning_rate, keeps)
                loss: Tensor = FusedMarginSoftmax.apply(inputs.unit, inputs.norms, *settings)
            else:
                rows, k = self._rows_of_step(step), self.centers_per_class
                loss = reference_loss(self.margin, inputs, *rows, k, self.group, self.matmul_half)
                if loss.requires_grad:
                    step.guard(loss)
            if self._is_training():
                self._advance_margin(step, after, loss.detach())
            return loss

    def prepare(self, local_label_batches: Sequence[Tensor]) -> None:
        """Draws the classes of one optimizer step ahead, from the labels of all its micro-batches.

        Under gradient accumulation every micro-batch of a step must see the same sample, with the
        positives of all of them in it. Without accumulation this is not needed: `forward` draws
        from its own batch. It costs one all-gather of labels, and nothing at r = 1.

        Args:
            local_label_batches: [b] integer labels of each micro-batch of this rank; as many
                micro-batches on every rank.
        """
        if self.sample_rate >= 1.0:
            return
        local_labels = torch.cat([labels.to(torch.int64) for labels in local_label_batches])
        local_labels = local_labels.to(self.device)
        if self.batch_size_per_rank is not None:
            capacity = len(local_label_batches) * self.batch_size_per_rank
        else:
            capacity = self._gatherer.capacity(len(local_labels), self.device)
        labels = gather_labels(local_labels, PAD_LABEL, capacity, self.group)
        self._begin(labels, labels.sort().values)

    @torch.no_grad()
    def step(
        self, learning_rate: float, bad: Tensor | None = None, gradient_scale: Tensor | None = None
    ) -> None:
        """Updates the class centers, unless backward did, and forgets the sample of the step.

        Centers whose `weight.requires_grad` is False stay as they are.

        Args:
            learning_rate: Learning rate of this step, the same as the backbone's.
            bad: Boolean scalar on the device. Where it is True, no row and no state is updated.
            gradient_scale: Factor by which a loss scaler multiplied the loss; the gradient is
                divided by it.

        Raises:
            RuntimeError: There is no row optimizer, or no gradient.
        """
        if self.row_optimizer is None:
            raise RuntimeError(
                "this PartialFC has no row optimizer: pass row_optimizer=SGDRows(...) or "
                "AdamWRows(...) of arcshard, or step weight.grad with an optimizer of yours"
            )
        step, is_trained = self._step, self.weight.requires_grad
        if not is_trained:
            step = step or StepContext(ClassCenters(*self._parts()))
        elif step is None or not (self._was_updated or step.updates or self._has_gradient(step)):
            raise RuntimeError(
                "no gradient: call loss.backward() before head.step(); the loss of a sampled head "
                "in evaluation mode does not count"
            )
        if step.bad is not None:  # the loss of a pass was not finite
            bad = step.bad if bad is None else bad | step.bad
        if self.fused is None and is_trained:
            rows = step.centers.rows
            for parameter, rule in self.optimized_parameters():
                assert parameter.grad is not None
                gradient = parameter.grad if rows is None else parameter.grad[rows]
                gradient = gradient if gradient_scale is None else gradient / gradient_scale
                rule.update_rows(parameter, gradient, rows, learning_rate, bad)
                parameter.grad = None
            step.finish()
        elif step.passes:
            with without_autocast(self.device):
                update_centers(step, learning_rate, bad, gradient_scale)
        if bad is not None:
            for name, before in step.margin_before.items():
                state = self.get_buffer(f"margin_{name}")
                state.copy_(torch.where(bad, before, state))
        self._step, self._was_updated = None, False

    def get_extra_state(self) -> dict[str, Any]:
        """Returns what sampling and draws need to continue as if they had not been interrupted."""
        return {
            "samples_drawn": self._samples_drawn,
            "forwards": self._forwards,
            "seed": self.seed,
            "roundings": [rule.sr_counter for _, rule in self.optimized_parameters()],
        }

    def optimized_parameters(self) -> list[tuple[nn.Parameter, RowOptimizer]]:
        """Returns each parameter that is updated by rows, with its row optimizer."""
        pairs = ((self.weight, self.row_optimizer), (self.bias, self._bias_optimizer))
        return [(p, rule) for p, rule in pairs if p is not None and rule is not None]

    def sampled_centers(self) -> tuple[ClassCenters, Tensor | None]:
        """Returns the rows that take part in the step in progress, and the classes they belong to.

        They are valid from `forward` until `backward` or `step` updates them.

        Returns:
            (the rows as constants, [S] int64 local classes or None for all).
        """
        step = self._step or self._new_step(torch.empty(0, dtype=torch.int64, device=self.device))
        return step.centers, step.classes

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Takes over the `get_extra_state` of a saved head."""
        self._samples_drawn, self.seed = state["samples_drawn"], state["seed"]
        self._forwards = state["forwards"]
        for (_, rule), count in zip(self.optimized_parameters(), state["roundings"], strict=True):
            rule.sr_counter = count
        self._identify_rules()
        for parameter, _ in self.optimized_parameters():
            parameter.grad = None  # a gradient of the centers before, for `step`
        self._step = None

    def planned_blocks(self) -> Plan:
        """Plans the blocks of a step on this rank.

        It is for the fused path with a `batch_size_per_rank`. A sample smaller than the batch
        counts as large as the batch's own classes can make it.

        Raises:
            ValueError: Not one class fits the workspace.
        """
        assert self.fused is not None
        assert self.batch_size_per_rank is not None
        batch = self.batch_size_per_rank * self.world_size
        rows = None
        if self.sample_rate < 1.0:
            size = sample_size(self.num_classes_local, self.sample_rate)
            size = max(size, min(batch, self.num_classes_local)) * self.centers_per_class
            rows = torch.empty(size, dtype=torch.int64, device="meta")
        centers = ClassCenters(*self._parts(), rows)
        return self.fused.plan(centers, batch, self.embedding_size)

    def describe_memory(self) -> str:
        """Describes, for the log, what memory the head holds on this rank."""
        state = [] if self.row_optimizer is None else self.row_optimizer.state(self.weight).values()
        size = sum(t.numel() * t.itemsize for t in (self.weight, *state)) / 2**20
        if self.fused is None:
            return f"centers and state {size:,.0f} MiB; logits and gradients by autograd"
        told = f"centers and state {size:,.0f} MiB{' in host memory' if self._host else ''}, "
        budget = self.fused.workspace.budget_bytes / 2**20
        if self.fused.workspace.note:
            told += f"{self.fused.workspace.note}, "
        if self.batch_size_per_rank is None:
            return told + f"workspace of at most {budget:,.0f} MiB"
        plan = self.planned_blocks()
        return told + (
            f"workspace {plan.total_bytes / 2**20:,.0f} of at most {budget:,.0f} MiB, "
            f"{len(plan.blocks())} blocks, softmax numerators of {plan.kept_rows:,} of "
            f"{plan.num_rows:,} centers kept for backward"
        )

    @property
    def has_kernels(self) -> bool:
        """Whether Triton kernels are used."""
        return self.fused is not None and self.fused.has_kernels

    def describe_kernels(self) -> str:
        """Describes, for the log, what computes what is not a plain product, and why."""
        if self.fused is None:
            return "kernels: those of PyTorch (update='autograd')"
        if not self.fused.has_kernels:
            return f"kernels: those of PyTorch ({self._no_kernels})"
        triton = "Triton" if self.device.type != "cpu" else "Triton (interpreted)"
        if self.fused.has_logits_kernel:
            return f"kernels: {triton} for the logits and the update"
        k, margin = self.centers_per_class, self.margin.describe()
        why = f"{k} centers per class" if k > 1 else margin
        return f"kernels: {triton} for the update, those of PyTorch for the logits ({why})"

    def extra_repr(self) -> str:
        """Returns the text in the parentheses of print(head)."""
        return (
            f"embedding_size={self.embedding_size}, num_classes={self.num_classes} "
            f"(here {self.class_range.start}..{self.class_range.stop - 1}), "
            f"sample_rate={self.sample_rate:g}, {self.margin.describe()}"
        )

    # --- details ----------------------------------------------------------------------------

    def _identify_rules(self) -> None:
        """Tells the row optimizers which rows they have, for the random bits of their rounding."""
        for _, rule in self.optimized_parameters():
            rule.seed = self.seed
            rule.first_row = self.class_range.start * self.centers_per_class

    def _is_training(self) -> bool:
        return self.training and torch.is_grad_enabled()

    def _step_of(self, labels: Tensor) -> StepContext:
        """Returns the step that a forward of these labels [B] belongs to.

        A forward of a sampled head that is no training belongs to a step of its own, which leaves
        the step in progress and the number of draws alone.
        """
        step, is_training = self._step, self._is_training()
        if self.sample_rate < 1.0 and not is_training:
            step = self._new_step(labels)
            step.is_evaluation = True
        elif (
            step is None
            or (self.sample_rate < 1.0 and step.prepared is None)
            or (step.updates and step.prepared is None and is_training)
        ):
            step = self._begin(labels)
        return step

    def _begin(self, labels: Tensor, prepared: Tensor | None = None) -> StepContext:
        """Begins a step; losses of the step before cannot be differentiated any more.

        Raises:
            RuntimeError: A gradient of the step before waits for `step`.
        """
        margin_before: dict[str, Tensor] = {}
        if self._step is not None:
            if self._has_gradient(self._step):
                raise RuntimeError(
                    "a second forward before head.step(): its classes would be another sample. To "
                    "accumulate gradients call head.prepare(labels of all micro-batches) first; to "
                    "drop a gradient call head.step(learning_rate, torch.tensor(True))"
                )
            self._was_updated |= self._step.updates > 0
            if not self._step.updates:  # a skipped step restores what its lost forwards moved, too
                margin_before = self._step.margin_before
            self._step.refusal = (
                "a later forward has begun another step: call backward before the next forward, or "
                "head.prepare(labels of all micro-batches) before the first one"
            )
            self._step = None  # frees the centers of the step before
        self._step = self._new_step(labels, prepared)
        self._step.margin_before = margin_before
        self._samples_drawn += self.sample_rate < 1.0
        return self._step

    def _new_step(self, labels: Tensor, prepared: Tensor | None = None) -> StepContext:
        """Draws the classes of a step for labels [B]; the number of the draw stays the same."""
        if self.sample_rate >= 1.0:
            return StepContext(ClassCenters(*self._parts()))
        draw = (self.seed, self.rank, self._samples_drawn)
        classes = draw_sample(
            self._localize(labels), self.num_classes_local, self.sample_rate, *draw
        )
        rows = self._rows_of(classes)
        if self._host is not None:
            return StepContext(OffloadedCenters(self._host, rows), classes, prepared)
        return StepContext(ClassCenters(*self._parts(), rows), classes, prepared)

    def _parts(self) -> tuple[nn.Parameter, Any, nn.Parameter | None, Any]:
        return self.weight, self.row_optimizer, self.bias, self._bias_optimizer

    def _has_gradient(self, step: StepContext) -> bool:
        return bool(step.passes) or (self.fused is None and self.weight.grad is not None)

    def _is_unprepared(self, prepared: Tensor, labels: Tensor) -> Tensor:
        """Says whether a label [B] was not given to `prepare`; on a CPU every rank raises."""
        unknown = (labels != PAD_LABEL) & (columns_of(prepared, labels) < 0)
        if labels.device.type == "cpu" and bool(unknown.any()):
            raise ValueError(
                f"label {int(labels[unknown][0])} is not among the labels that head.prepare() was "
                "given for this step: give it the labels of all micro-batches"
            )
        return unknown.any()

    def _inputs(
        self, batch: GlobalBatch, step: StepContext
    ) -> tuple[SoftmaxInputs, Mapping[str, Tensor]]:
        """Returns what the softmax needs to know, and the margin's running values after it."""
        norms = torch.linalg.vector_norm(batch.embeddings, dim=1)  # [B]
        # An infinite embedding can have a finite loss without normalization. Finite ones that are
        # so long that their norms overflow would count as zero vectors.
        veto = batch.has_unknown | ~batch.is_real.any() | ~is_finite(norms.detach()).all()
        if step.prepared is not None:
            veto = veto | self._is_unprepared(step.prepared, batch.labels)
        unit = batch.embeddings / norms.clamp_min(NORM_FLOOR)[:, None]
        self.mean_pairwise_cosine = mean_pairwise_cosine(unit, batch.is_real)
        unit = unit if self.margin.normalize else batch.embeddings
        column = self._localize(batch.labels)
        if step.classes is not None:
            column = columns_of(step.classes, column)
        target = find_positive_logits(
            unit.detach(), column, step.centers, self.margin.normalize, self.centers_per_class
        )
        context, after = self._begin_margin(norms, target, batch.is_real)
        row_weight = batch.is_real.to(unit.dtype) / batch.is_real.sum()
        read = norms if self.margin.reads_norms else None
        return SoftmaxInputs(unit, read, target, context, row_weight, veto), after

    def _rows_of(self, classes: Tensor) -> Tensor:
        """Returns the rows of the shard that hold these classes' centers, K per class."""
        k = self.centers_per_class
        if k == 1:
            return classes
        return (classes[:, None] * k + torch.arange(k, device=classes.device)).view(-1)

    def _rows_of_step(self, step: StepContext) -> tuple[Tensor, Tensor | None]:
        """Returns weight and bias of the classes that take part, for autograd."""
        rows = step.centers.rows
        if rows is None:
            return self.weight, self.bias
        if step.is_evaluation:  # a gradient would be added to that of the step in progress
            return step.centers.read(0, len(rows)), step.centers.read_bias(0, len(rows))
        return self.weight[rows], None if self.bias is None else self.bias[rows]

    @torch.no_grad()
    def _begin_margin(
        self, norms: Tensor, target: PositiveLogits, is_real: Tensor
    ) -> tuple[Context, Mapping[str, Tensor]]:
        """Returns the margin's context of this batch, and its running values after it."""
        reads = self.margin.reads_all_targets
        targets = sum_over_ranks(target.similarity, self.group) if reads else None
        state = {name: self.get_buffer(f"margin_{name}") for name in self.margin.initial_state()}
        draw = hash_key(self.seed, 0xD4A3, self._forwards)
        return self.margin.begin(BatchFacts(norms, targets, is_real, draw), state)

    @torch.no_grad()
    def _advance_margin(self, step: StepContext, after: Mapping[str, Tensor], loss: Tensor) -> None:
        """Updates the margin's running values, unless the loss is not finite."""
        self._forwards += 1
        for name in self.margin.initial_state():
            value = self.get_buffer(f"margin_{name}")
            step.margin_before.setdefault(name, value.clone())
            value.copy_(torch.where(torch.isfinite(loss), after[name], value))

    def _localize(self, labels: Tensor) -> Tensor:
        """Returns global labels in this rank's numbering, -1 where another rank owns the class."""
        here = (labels >= self.class_range.start) & (labels < self.class_range.stop)
        return torch.where(here, labels - self.class_range.start, -1)

    def _check(
        self,
        workspace_mib: float | str,
        dtype: torch.dtype,
        center_device: torch.device | str | None,
        kernels: str,
    ) -> None:
        size, classes, rate = self.embedding_size, self.num_classes, self.sample_rate
        batch, k, half = self.batch_size_per_rank, self.centers_per_class, self.matmul_half
        fused, mib, away = self.update == "fused", workspace_mib, center_device is not None
        has_mib = mib == "auto" or (isinstance(mib, (int, float)) and 0 < mib < math.inf)
        half_centers = dtype == torch.bfloat16 and fused
        refuse(
            (
                size >= 1 <= classes,
                f"embedding_size={size}, num_classes={classes}: at least 1 each",
            ),
            (0 <= rate <= 1, f"sample_rate={rate!r}: a share in [0, 1] (1 uses all classes)"),
            (fused or self.update == "autograd", f"update={self.update!r}: fused or autograd"),
            (
                self.row_optimizer is not None or not fused,
                "update='fused' moves the class centers itself: pass row_optimizer=SGDRows(...) or "
                "AdamWRows(...)",
            ),
            (batch is None or batch >= 1, f"batch_size_per_rank={batch}: at least 1, or None"),
            (k >= 1, f"centers_per_class={k}: at least 1"),
            (kernels in MODES, f"kernels={kernels!r}: one of {', '.join(MODES)}"),
            (has_mib, f"workspace_mib={mib!r}: MiB above 0, or 'auto'"),
            (
                half in (None, torch.bfloat16),
                f"half={half}: torch.bfloat16, or None for full precision",
            ),
            (
                dtype in (torch.float32, torch.float64) or half_centers,
                f"dtype={dtype}: class centers are float32 or float64, or bfloat16 with "
                "update='fused'",
            ),
            (
                dtype != torch.float64
                or self.row_optimizer is None
                or self.row_optimizer.state_dtype is None,
                "state_dtype=torch.bfloat16: for centers in float32 or bfloat16",
            ),
            (
                not away or (fused and rate < 1 and not self.margin.bias),
                f"center_device={center_device!r}: centers away from the computing device need "
                "update='fused', sample_rate < 1 and a loss without bias",
            ),
            (
                not away or torch.device(center_device or "cpu").type == "cpu",
                f"center_device={center_device!r}: 'cpu' (host memory), or None",
            ),
        )
