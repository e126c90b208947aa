"""One optimizer step: forward, head, backward, clip, update; nothing waits for the device.

Two heads do wait, once per step: one with class centers in host memory, and one with a sample
smaller than the global batch (sample_rate x classes per rank), whose size depends on the labels.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from arcshard.random import get_rng_state, set_rng_state
from dataset import Batch
from training.batch_norm import BatchNormStatistics
from training.classifier import Head
from training.distillation import Distillation
from training.ema import ModelEma
from training.optimizer import own_optimizer, set_learning_rate
from training.precision import tf32_allowed
from training.profile import phase


class StepOutcome(NamedTuple):
    """What a step did, as scalars on the device.

    Attributes:
        loss: Mean loss over the global batch.
        grad_norm: Norm of the backbone's gradient before clipping; 0 if the backbone is frozen.
        bad: True if the loss or the gradient was not finite, so that the step was skipped on every
            rank. Centers that are updated in backward are skipped for a non-finite loss only.
        loss_scale: Loss scale of fp16, 1 otherwise.
        distillation: Distillation loss without its weight; None without a teacher.
    """

    loss: Tensor
    grad_norm: Tensor
    bad: Tensor
    loss_scale: Tensor
    distillation: Tensor | None = None


class TrainStep:
    """Holds what a step needs; a call makes one step.

    Args:
        model: Maps uint8 images to embeddings. With several ranks it is wrapped by `parallelize`.
        head: The head, with a row optimizer.
        optimizer: Optimizer of the backbone (training/optimizer.py). It is fused, so that it can
            skip a step without asking the host.
        batch_norm: Statistics of the backbone, which are restored after a skipped step.
        clip_grad_norm: Largest norm of the backbone's gradient; 0 does not clip.
        scaler: Loss scaler for fp16, or None.
        needs_full_batch: Whether the loss needs all micro-batches of a step at once.
        tf32: Whether TF32 is allowed while a step runs. Verification is always in full fp32.
        distillation: A second loss, from a teacher (training/distillation.py).
        average: Moving average of the backbone's weights, updated after each step.
    """

    def __init__(
        self,
        model: nn.Module,
        head: Head,
        optimizer: torch.optim.Optimizer,
        batch_norm: BatchNormStatistics,
        *,
        clip_grad_norm: float,
        scaler: torch.amp.GradScaler | None,
        needs_full_batch: bool = False,
        tf32: bool = False,
        distillation: Distillation | None = None,
        average: ModelEma | None = None,
    ) -> None:
        self.model, self.head, self.optimizer = model, head, optimizer
        self.batch_norm, self.clip_grad_norm, self.scaler = batch_norm, clip_grad_norm, scaler
        self.needs_full_batch, self.tf32, self.average = needs_full_batch, tf32, average
        self.distillation = distillation
        self._taught: Tensor | None = None  # the distillation loss of the step in progress
        self.device, self.dtype = head.device, head.work_dtype
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self._one = torch.ones((), device=self.device)

    def __call__(
        self, micro_batches: Sequence[Batch], learning_rate: float, is_frozen: bool = False
    ) -> StepOutcome:
        """Step on the mean over all micro-batches, as if they were one batch.

        Args:
            micro_batches: The batches of this rank.
            learning_rate: Learning rate of the step.
            is_frozen: Whether only the class centers are updated; the backbone then runs in eval
                mode.

        Returns:
            The outcome, on the device.
        """
        if self.model.training == is_frozen:
            self.model.train(not is_frozen)
        micro_batches = [
            Batch(*(tensor.to(self.device, non_blocking=True) for tensor in batch))
            for batch in micro_batches
        ]
        step = self._centers_only if is_frozen else self._whole
        with tf32_allowed(self.tf32):
            return step(micro_batches, learning_rate)

    def _whole(self, micro_batches: Sequence[Batch], learning_rate: float) -> StepOutcome:
        self.optimizer.zero_grad(set_to_none=True)
        self.batch_norm.snapshot()
        self._taught = None
        scale = self.scaler.scale(self._one) if self.scaler else self._one
        if self.needs_full_batch:
            loss = self._all_at_once(micro_batches, scale)
        else:
            loss = self._one_by_one(micro_batches, scale, learning_rate)

        with phase("optimizer"):
            if self.scaler:
                self.scaler.unscale_(self.optimizer)
            grad_norm = self._clip()
            bad = ~(torch.isfinite(loss) & torch.isfinite(grad_norm))
            set_learning_rate(self.optimizer, learning_rate)
            # Fused optimizers leave parameters and state alone where found_inf is 1.
            mover = own_optimizer(self.optimizer)
            mover.found_inf = bad.to(torch.float32)  # type: ignore[attr-defined]
            self.optimizer.step()
            del mover.found_inf  # type: ignore[attr-defined]
        with phase("head"):
            self.head.step(learning_rate, bad, scale if self.scaler else None)
        self.batch_norm.restore_where(bad)
        if self.average:
            with phase("optimizer"):
                self.average.update(bad)
        if self.scaler:
            self.scaler.update()  # uses the found_inf of unscale_
        return StepOutcome(loss, grad_norm.detach(), bad, scale, self._taught)

    def _centers_only(self, micro_batches: Sequence[Batch], learning_rate: float) -> StepOutcome:
        """Run the forward pass without a graph, and the head's step.

        The backbone has no gradient that could overflow, so there is no loss scaler, and the
        centers of a single batch are updated in backward. A teacher could not change the backbone's
        gradient either, so the centers learn from the head's own loss alone.
        """
        with phase("forward"), torch.no_grad():
            embeddings = [self._bare(batch.images) for batch in micro_batches]
        labels = [batch.labels for batch in micro_batches]
        if self.needs_full_batch:
            embeddings, labels = [torch.cat(embeddings)], [torch.cat(labels)]
        count = len(labels)
        loss = torch.zeros((), dtype=self.dtype, device=self.device)
        with phase("head"):
            if count > 1:
                self.head.prepare(labels)
            for each, of_each in zip(embeddings, labels, strict=True):
                part = self.head(
                    each.requires_grad_(True), of_each, learning_rate if count == 1 else None
                )
                (part / count).backward()
                loss += part.detach() / count
            bad = ~torch.isfinite(loss)
            self.head.step(learning_rate, bad)
        return StepOutcome(loss, torch.zeros_like(loss), bad, self._one)

    def _one_by_one(
        self, micro_batches: Sequence[Batch], scale: Tensor, learning_rate: float
    ) -> Tensor:
        """Run backward of every micro-batch's part of the loss; centers are updated in head.step.

        A single batch without a loss scaler lets the head update its centers in backward, because
        then only its own loss could make it skip the step. If the backbone's gradient overflows
        although the loss is finite, the step counts as skipped and the backbone is not updated, but
        the centers are.
        """
        count = len(micro_batches)
        if count > 1:
            self.head.prepare([batch.labels for batch in micro_batches])
        moves_in_backward = count == 1 and self.scaler is None
        loss = torch.zeros((), dtype=self.dtype, device=self.device)
        for number, batch in enumerate(micro_batches, start=1):
            with nullcontext() if number == count else self._without_all_reduce():
                with phase("forward"):
                    embeddings = self._summed_over_ranks(self.model(batch.images))  # [b, D]
                    cut = embeddings.detach().requires_grad_(True)
                with phase("head"):
                    part = self.head(
                        cut, batch.labels, learning_rate if moves_in_backward else None
                    )
                objective, part = self._objective(part, [batch], cut, count)
                with phase("head"):
                    (objective * scale).backward()
                with phase("backward"):
                    embeddings.backward(cut.grad)
                loss += part.detach()
        return loss

    def _all_at_once(self, micro_batches: Sequence[Batch], scale: Tensor) -> Tensor:
        """Compute one loss over all micro-batches, for margins that need the whole batch.

        This embeds them without a graph, runs the head once, and embeds each again with the same
        dropout and masks to propagate its part of dE. Both passes run the same code, because
        compiled graphs draw other random numbers than the modules they come from. The running
        statistics of batch norm see each image once.
        """
        states, parts = [], []
        with phase("forward"), torch.no_grad():
            for batch in micro_batches:
                states.append(get_rng_state(self.device))
                parts.append(self.model(batch.images))
        self.batch_norm.pause()
        embeddings = torch.cat(parts).requires_grad_(True)  # [acc b, D]
        with phase("head"):
            loss = self.head(embeddings, torch.cat([batch.labels for batch in micro_batches]))
        objective, loss = self._objective(loss, micro_batches, embeddings)
        with phase("head"):
            (objective * scale).backward()
        assert embeddings.grad is not None
        gradients = embeddings.grad.split([len(part) for part in parts])
        for number, (batch, state, gradient) in enumerate(
            zip(micro_batches, states, gradients, strict=True), start=1
        ):
            set_rng_state(self.device, state)
            with nullcontext() if number == len(parts) else self._without_all_reduce():
                with phase("forward"):
                    again = self._summed_over_ranks(self.model(batch.images))
                with phase("backward"):
                    again.backward(gradient)
        self.batch_norm.resume()
        return loss.detach()

    def _objective(
        self, loss: Tensor, batches: Sequence[Batch], embeddings: Tensor, count: int = 1
    ) -> tuple[Tensor, Tensor]:
        """Return what is differentiated, and the head's loss, of one of `count` parts of the step.

        Where the teacher's loss is not finite, the head's loss is made NaN, so that the step is
        skipped.
        """
        loss = loss / count
        if self.distillation is None:
            return loss, loss
        with phase("teacher"):
            taught = self.distillation([batch.images for batch in batches], embeddings) / count
        loss = loss * torch.where(torch.isfinite(taught.detach()), 1.0, torch.nan)
        self._taught = taught.detach() + (0.0 if self._taught is None else self._taught)
        return loss + self.distillation.weight * taught, loss

    def _summed_over_ranks(self, embeddings: Tensor) -> Tensor:
        """Make DDP add gradients over ranks although it averages them.

        The loss is the mean over the global batch already.
        """
        if self.head.world_size == 1:
            return embeddings
        scaled: Tensor = _TimesInBackward.apply(embeddings, self.head.world_size)
        return scaled

    @property
    def _bare(self) -> nn.Module:
        """The model without DDP, for passes that no backward follows."""
        model = self.model
        return model.module if isinstance(model, DistributedDataParallel) else model

    def _without_all_reduce(self) -> Any:
        model = self.model
        return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()

    def _clip(self) -> Tensor:
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        grad_norm = nn.utils.get_total_norm(gradients)
        if self.clip_grad_norm > 0:
            nn.utils.clip_grads_with_norm_(self.parameters, self.clip_grad_norm, grad_norm)
        return grad_norm


class _TimesInBackward(torch.autograd.Function):
    """The identity, with the gradient multiplied by a constant."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, factor: int) -> Tensor:
        ctx.factor = factor
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * ctx.factor, None
