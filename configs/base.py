"""The schema of a run: every key with its type, range, default, meaning, unit and scope.

A run (`configs/<name>.py`, or a file of your own) states only how it differs from this. pydantic
checks type and range of every value; `Config.problems()` has the rules across keys.
`utils/config.py` applies the run and the command line to these defaults and reports everything
that is wrong at once.

The keys of InsightFace's arcface_torch keep their names. Where an old behavior was a bug, the key
does what its name says.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, Strict

LossName = Literal[
    "combined",
    "softmax",
    "normface",
    "arcface",
    "cosface",
    "sphereface",
    "adaface",
    "magface",
    "curricularface",
    "elasticface_arc",
    "elasticface_cos",
    "subcenter_arcface",
]
LOSSES: tuple[LossName, ...] = get_args(LossName)


def _number(value: Any) -> Any:
    """Refuses what pydantic would convert: bools, which equal 0 and 1, tensors, decimals, text."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("no number")
    return value


def _whole(value: Any) -> Any:
    """Returns 5 for 5.0. Beyond 2**53 a float no longer tells which whole number was meant."""
    is_exact = isinstance(value, float) and value.is_integer() and abs(value) <= 2**53
    return int(value) if is_exact else _number(value)


# A value must have the type of its key. These are taken for each other: 5.0 for 5, a list for a
# tuple, a Path for its text.
Bool = Annotated[bool, Strict()]
Int = Annotated[int, Strict(), BeforeValidator(_whole)]
Float = Annotated[float, Strict(), BeforeValidator(_number), Field(allow_inf_nan=False)]
Text = Annotated[str, Strict(), BeforeValidator(lambda v: str(v) if isinstance(v, Path) else v)]
TupleToList = BeforeValidator(lambda value: list(value) if isinstance(value, tuple) else value)
ListToTuple = BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)
Texts = Annotated[list[Text], Strict(), TupleToList]
Pair = Annotated[tuple[Float, Float], Strict(), ListToTuple]
Number = BeforeValidator(_number)
PositiveInt = Annotated[Int, Field(ge=1)]
NonNegativeInt = Annotated[Int, Field(ge=0)]
PositiveFloat = Annotated[Float, Field(gt=0)]
NonNegativeFloat = Annotated[Float, Field(ge=0)]


class Settings(BaseModel):
    """The keys of one subject. The string below a key is its help."""

    model_config = ConfigDict(
        use_attribute_docstrings=True, extra="forbid", validate_assignment=True
    )


class Data(Settings):
    """The task and its data."""

    task: Literal["recognition", "classification"] = "recognition"
    """What is trained: "recognition", a margin loss, with verification; or "classification", plain
    softmax over the classes of a folder with train/ and val/, with top-1 and top-5 accuracy
    (docs/classification.md)."""

    rec: Text | Texts | None = None
    """Training set: a folder with train.rec and train.idx, a folder with one folder of images per
    identity, or "synthetic" for generated input. A list joins several sets: the classes of each set
    come after those of the one before. Required."""

    rec_weights: Annotated[list[PositiveFloat], Strict(), TupleToList] | None = None
    """Share of each set of `rec` in an epoch's images, as relative numbers. None: shares by
    size."""

    exclude: Text | Texts | None = None
    """Text file of images and classes to leave out (docs/data.md). With several sets, one file for
    each, "-" for none."""

    num_classes: PositiveInt | Literal["auto"] = "auto"
    """Number of identities C, over all ranks; "auto" reads it from `property` or the records. More
    than the labels need is allowed (padding); fewer is an error."""

    num_image: PositiveInt | Literal["auto"] = "auto"
    """Number of training images; "auto" counts them. A number that differs from the set is only
    reported in the log; with rec="synthetic" it is the size of the set."""

    samples_per_class: NonNegativeInt = 0
    """Class-balanced sampling: every identity is drawn equally often, with this many of its images
    at a time in a batch; batch_size must be a multiple of it. 0: every image once per epoch."""

    shuffle_block: NonNegativeInt = 0
    """Images per block of a block-wise shuffle, for spinning or network disks. 0: a random order of
    the whole set."""

    augment: Texts = Field(default_factory=list)
    """Augmentations besides flips: names (crop, resize, low_res, blur, hsv, gray, photometric,
    erase), each also with a probability ("erase=0.3"), or the sets "dali_aug" and "adaface"."""

    crop_area: Pair = (0.08, 1.0)
    """Classification: smallest and largest share of an image's area in the random crop used for
    training, in (0, 1]; the crop's width / height lies in 3/4 to 4/3."""

    on_bad_record: Literal["error", "skip"] = "error"
    """"error" stops at an image that cannot be read and names it; "skip" counts it, logs it and
    replaces it by another of its batch."""

    num_workers: NonNegativeInt = 2
    """Decoding threads per rank (DALI's, with dali=True); 0 decodes in the training thread."""

    dali: Bool = False
    """Decode and augment with NVIDIA DALI, on the GPU if there is one, with the same order and the
    same draws. Where DALI is not installed, ArcShard's own reader is used, with a warning."""


class Model(Settings):
    """The backbone, its start and its teacher."""

    network: Text = "r50"
    """Backbone, by name; `train_v2.py help network` lists them."""

    embedding_size: PositiveInt = 512
    """Width D of the embedding."""

    input_size: Annotated[Int, Field(ge=16)] = 112
    """Height and width of the input images, in pixels."""

    dropout: Annotated[Float, Field(ge=0, lt=1)] = 0.0
    """Probability of dropout before the embedding layer (IResNet), in [0, 1)."""

    drop_path_rate: Annotated[Float, Field(ge=0, lt=1)] | None = None
    """ViT: stochastic depth of the last block, in [0, 1); it grows linearly from 0 at the first
    block. None: the value published under the network's name."""

    mask_ratio: Annotated[Float, Field(ge=0, lt=1)] | None = None
    """ViT: share of patches that are removed from a training image, in [0, 1); at inference none
    are removed. None: the value published under the network's name."""

    gradient_checkpointing: Bool = False
    """Recompute the backbone's stages in the backward pass: less memory, about a third slower."""

    init_backbone: Text | None = None
    """Weights to start the backbone from: a model.pt, a run folder or an arcface_torch file. The
    log reports what matched; nothing matching is an error."""

    init_head: Text | None = None
    """Class centers to start from: a run folder or one of its checkpoints. Identities that both
    label maps name keep their center and its optimizer state; new ones start at the mean embedding
    of their images (docs/fine_tuning.md)."""

    freeze_epoch: NonNegativeInt = 0
    """Number of epochs at the start in which only the class centers are updated. The backbone and
    its batch-norm statistics stay as they are, and it works as at inference (no dropout, no
    masking)."""

    freeze_batch_norm: Bool = False
    """Batch norm uses its running statistics and does not update them (for fine-tuning and
    proofs)."""

    teacher: Text | None = None
    """Knowledge distillation: the run folder or model.pt of a frozen teacher. distillation="logits"
    needs its run folder, with checkpoints (docs/distillation.md)."""

    distillation: Literal["cosine", "logits"] = "cosine"
    """Distillation loss: "cosine", 1 - cosine of the student's and the teacher's embedding; or
    "logits", T^2 times the divergence of the student's class probabilities from the teacher's,
    without a margin in either."""

    distillation_weight: PositiveFloat = 1.0
    """Factor on the distillation loss, which is added to the head's; above 0. The log and
    metrics.jsonl show both losses separately, without this factor."""

    distillation_temperature: PositiveFloat = 4.0
    """distillation="logits": the temperature T, by which the logits of both sides are divided."""


class Head(Settings):
    """The head: loss, margin and class centers."""

    loss: LossName = "combined"
    """Loss, by name; `train_v2.py help loss` lists the formulas. "combined" is configured by
    margin_list. The log prints the formula in force."""

    margin_list: Annotated[
        tuple[
            Annotated[Float, Field(gt=0, title="m1")],
            Annotated[Float, Field(ge=0, lt=math.pi, title="m2")],
            Annotated[Float, Field(ge=0, le=2, title="m3")],
        ],
        Strict(),
        ListToTuple,
    ] = (1.0, 0.5, 0.0)
    """loss="combined": (m1, m2, m3) of cos(m1 theta + m2) - m3; m1 multiplies, m2 is in radians,
    m3 in units of cosine. ArcFace (1, m, 0), CosFace (1, 0, m), SphereFace (m, 0, 0)."""

    margin: Float | None = None
    """The margin m of a loss by name, in the unit of that loss; None: the paper's value. Not for
    combined, softmax, normface and magface."""

    scale: PositiveFloat = 64.0
    """Factor s on the cosines before the softmax; loss="softmax" uses 1 instead."""

    margin_gradient: Literal["exact", "straight_through"] = "exact"
    """Derivative of the margin in the backward pass: "exact", or "straight_through" for 1 instead,
    with which the published ArcFace weights were trained. For combined, arcface, cosface and
    sphereface."""

    softmax_bias: Bool = True
    """loss="softmax": whether a bias per class is learned."""

    parallel_dim: Annotated[Literal[0, 1, -1], Number] | None = 1
    """Classification: how the last layer is split over the ranks: 1 or -1 by classes, 0 by input
    features, None not at all (every rank holds all of it). Recognition: 1."""

    label_smoothing: Annotated[Float, Field(ge=0, lt=1)] = 0.0
    """Classification: share of the target that is spread over all classes, in [0, 1). Above 0 the
    last layer's logits and gradients are whole tensors on each rank (docs/classification.md)."""

    adaface_h: Float = 0.333
    """loss="adaface": the factor h on the standardized norms, which are clipped to [-1, 1] after
    it."""

    adaface_t_alpha: Float = 0.01
    """loss="adaface": weight of a global batch in the running statistics of the norms."""

    magface_norms: Pair = (10.0, 110.0)
    """loss="magface": lower and upper bound of the embeddings' norm, (l_a, u_a)."""

    magface_margins: Pair = (0.45, 0.8)
    """loss="magface": margins at those bounds, (l_margin, u_margin), in radians."""

    magface_lambda_g: Float = 20.0
    """loss="magface": weight of the regularizer."""

    curricular_alpha: Float = 0.01
    """loss="curricularface": weight of a global batch in the running target cosine t."""

    elastic_std: Float = 0.0125
    """loss="elasticface_*": standard deviation of the drawn margins."""

    elastic_plus: Bool = False
    """loss="elasticface_*": ElasticFace+, which gives harder samples larger margins."""

    sub_centers: PositiveInt | None = None
    """Centers per class, K; a class counts with its best one. None: 3 for subcenter_arcface, else
    1. Works with every loss."""

    sample_rate: Annotated[Float, Field(ge=0, le=1)] = 1.0
    """Share of each rank's class centers used per step, in [0, 1]; the batch's own classes are
    always included. 0: only the batch's classes."""

    interclass_filtering_threshold: Annotated[Float, Field(ge=0, le=1)] = 0.0
    """Other classes whose cosine exceeds this are taken for label noise; 0 switches it off."""

    interclass_filtering_mode: Literal["remove", "legacy"] = "remove"
    """"remove" removes filtered classes from the softmax; "legacy" sets their cosine to 0, as the
    published code did."""

    head_update: Literal["fused", "autograd"] = "fused"
    """Path of the head's backward pass and update: "fused", over blocks of classes, without a B x C
    matrix or a C x D gradient; or "autograd", the reference with an ordinary gradient, slower and
    larger."""

    head_workspace_mib: PositiveInt | Literal["auto"] = "auto"
    """Memory of the fused head per rank, in MiB, beside class centers, their state and O(global
    batch). More memory keeps more from forward to backward, which is faster. "auto": an eighth of a
    GPU's memory, or less where all softmax numerators are kept with less; 256 MiB on a CPU."""

    head_kernels: Literal["auto", "triton", "torch"] = "auto"
    """"auto" and "triton": Triton kernels do what is not a plain matmul in the fused head, on GPUs
    of compute capability 8.0 or higher with bf16 (see precision). "torch": PyTorch does it, as
    everywhere else. The log says which, and why."""

    head_offload: Bool = False
    """Keep class centers and their optimizer state in host memory and copy the sampled ones to the
    device in each step (needs sample_rate < 1). False: they are on the training device."""

    head_weight_dtype: Literal["fp32", "bf16"] = "fp32"
    """"fp32", or "bf16": class centers in half the memory, with stochastic rounding."""

    head_state_dtype: Literal["fp32", "bf16"] = "fp32"
    """"fp32", or "bf16": momentum or Adam's averages of the class centers in half the memory, with
    stochastic rounding."""


class Optimization(Settings):
    """Optimization."""

    batch_size: PositiveInt = 128
    """Images per rank and micro-step. Global batch = batch_size x world size x gradient_acc."""

    global_batch_size: PositiveInt | None = None
    """Images per optimizer step over all ranks. If set, it stays the same on any number of ranks:
    each rank takes its share in as many micro-steps as it needs, with at most batch_size images at
    a time."""

    gradient_acc: PositiveInt = 1
    """Micro-steps per optimizer step; one step equals the step on the whole global batch."""

    num_epoch: PositiveInt = 20
    """Passes over the training set."""

    max_steps: NonNegativeInt | None = None
    """Stop after this many optimizer steps; the schedule still spans num_epoch. None: no limit."""

    optimizer: Literal["sgd", "adamw"] = "sgd"
    """"sgd" (with momentum) or "adamw", for backbone and head."""

    lr: NonNegativeFloat = 0.1
    """Peak learning rate of backbone and head, per optimizer step."""

    lr_base_batch: PositiveInt | None = None
    """If set, the learning rate is lr x global batch / lr_base_batch (linear scaling)."""

    lr_schedule: Literal["polynomial", "cosine", "constant"] = "polynomial"
    """"polynomial" (power 2, to 0), "cosine" (to 0) or "constant", after the warm-up."""

    warmup_epoch: Float = 0.0
    """Epochs of linear warm-up from zero; 0 or -1: none."""

    momentum: Annotated[Float, Field(ge=0, lt=1)] = 0.9
    """Momentum of SGD, in [0, 1)."""

    weight_decay: NonNegativeFloat = 5e-4
    """Weight decay of backbone and head: coupled for sgd, decoupled for adamw."""

    decay_norms_and_biases: Bool = True
    """Whether weight_decay also applies to the backbone's norms, biases and other vectors, as in
    the published runs."""

    layer_decay: Annotated[Float, Field(gt=0, le=1)] = 1.0
    """Learning rate of each stage or block of the backbone relative to the one after it, in (0, 1];
    the embedding layer has lr. 1: the same learning rate everywhere."""

    ema_decay: Annotated[Float, Field(ge=0, lt=1)] = 0.0
    """Exponential moving average of the backbone: share of the old average kept per optimizer step,
    in [0, 1). It is less in the first steps: min(ema_decay, (1 + n) / (10 + n)) after n steps. The
    average is what is verified and saved (model.pt, model_best.pt); training continues with the
    weights themselves. Recognition only. 0: off."""

    zero_stage: Annotated[Literal[0, 1], Number] = 0
    """ZeRO stage: 1 shards the backbone's optimizer state over the ranks (ZeroRedundancyOptimizer),
    and 0 keeps all of it on every rank. Checkpoints and results are the same; with 1 each step
    broadcasts the parameters."""

    clip_grad_norm: NonNegativeFloat = 5.0
    """Largest norm of the backbone's gradient, which is clipped to it; 0 switches clipping off."""

    on_divergence: Literal["stop", "rollback"] = "stop"
    """"stop", or "rollback": return to the last good checkpoint and leave out the data that led to
    the divergence."""

    max_rollbacks: NonNegativeInt = 3
    """on_divergence="rollback": largest number of rollbacks, after which the run stops."""

    max_bad_steps: PositiveInt = 20
    """Number of consecutive steps with a non-finite loss, which update nothing, after which the run
    stops with exit code 3. Checked at log steps."""


class Devices(Settings):
    """Precision and devices."""

    precision: Literal["fp32", "tf32", "bf16", "fp16", "fp64"] | None = None
    """"fp32" (full, no TF32), "tf32", "bf16", "fp16" (with a loss scaler) or "fp64" (for proofs).
    None: what `fp16` asks for, else bf16 on GPUs that support it and fp32 elsewhere."""

    fp16: Bool = False
    """arcface_torch's switch: fp16 with a loss scaler on CUDA. On a CPU, where half precision is
    often slower, fp32 with one warning. An explicit `precision` takes precedence."""

    channels_last: Bool = True
    """Images and convolutions in channels_last memory format; the results are the same up to
    rounding."""

    compile: Bool = False
    """torch.compile of the backbone's training step, for its fixed shapes. The start takes minutes
    longer; the log says how long. Needs a C++ compiler on CPUs."""

    grad_reduce_dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Dtype in which ranks sum the backbone's gradients: "fp32", or "bf16" and "fp16" with half the
    traffic. arcface_torch always used fp16."""

    device: Literal["auto", "cuda", "cpu"] = "auto"
    """"auto" (CUDA if there is one), "cuda" or "cpu"."""

    collective_timeout_s: Annotated[Float, Field(ge=1)] = 600.0
    """Seconds without progress after which the run ends with exit code 5 and names the ranks that
    lag behind."""

    seed: Annotated[Int, Field(ge=0, lt=2**63)] = 2048
    """Seed of initial weights, class sampling, image order and augmentation."""


class Verification(Settings):
    """Verification during training."""

    val_targets: Texts = Field(default_factory=list)
    """Verification sets (names of .bin files in val_dir) scored during training and at the end. A
    missing one is an error before training starts."""

    val_dir: Text | None = None
    """Folder of the .bin files. None: the training set's folder."""

    val_batch_size: PositiveInt = 64
    """Images per rank that are embedded at a time in verification."""


class Run(Settings):
    """The run and its checkpoints."""

    output: Text | None = None
    """Folder of the run's files. None: work_dirs/<config name>."""

    resume: Bool | Text = False
    """Resume from a checkpoint: "auto" (or True) takes the newest intact one in `output`, if there
    is one; a path takes that one. False starts from the beginning, except where torchrun has
    restarted the ranks of this run: they resume as with "auto". "never" starts from the beginning
    even then. docs/checkpoints.md says which settings may change in between."""

    checkpoint_every: NonNegativeInt = 0
    """Optimizer steps between two checkpoints; 0: none by steps. The ends of epochs, a new best
    accuracy and the end of the run are saved in any case."""

    checkpoint_minutes: NonNegativeFloat = 15.0
    """Minutes between two checkpoints; 0: none by time."""

    keep_checkpoints: NonNegativeInt = 3
    """Number of newest checkpoints that are kept; the best one is kept as well. 0: none are
    written, except when a signal stops the run."""

    max_failed_saves: PositiveInt = 3
    """Number of consecutive checkpoints that could not be written after which the run stops with
    exit code 6; before that it continues."""

    frequent: PositiveInt = 10
    """Optimizer steps between two log lines."""

    verbose: NonNegativeInt = 2000
    """Optimizer steps between two verifications; 0: none during training, only the one at the
    end."""

    profile: NonNegativeInt = 0
    """Number of steps to profile, after the first five. A trace and a page on where their time goes
    are written to profile/ of the output. 0: none."""

    notes: Text = ""
    """Free text, saved in config.json."""


class WeightsAndBiases(Settings):
    """Weights & Biases (optional)."""

    using_wandb: Bool = False
    """Log to Weights & Biases as well; the key comes from the environment (WANDB_API_KEY)."""

    wandb_entity: Text | None = None
    """Entity (team or user) of the run."""

    wandb_project: Text | None = None
    """Project of the run."""

    wandb_resume: Bool = False
    """Let wandb continue the run of the same id."""

    wandb_log_all: Bool = True
    """Whether every rank logs, in one group, or rank 0 only."""

    suffix_run_name: Text | None = None
    """Text appended to the run's name."""

    save_artifacts: Bool = False
    """Upload model.pt as an artifact at the end."""


# pydantic puts the keys of the last base first.
class Config(WeightsAndBiases, Run, Verification, Devices, Optimization, Head, Model, Data):
    """All settings of one training run."""

    _remarks: tuple[str, ...] = ()  # of utils/config.py, on keys that it left out

    def replace(self, **changes: Any) -> Self:
        """Returns a copy with other values, which are checked as well."""
        copy = type(self)(**{**vars(self), **changes})
        copy._remarks = self._remarks
        return copy

    def problems(self) -> list[str]:
        """Returns what is wrong with the combination of values, one sentence each.

        What needs files, networks or devices (whether the set exists, whether there is a GPU) is
        checked by training/build.py.
        """
        rules = (
            self._rules_of_the_data,
            self._rules_of_the_model,
            self._rules_of_the_task,
        )
        return [sentence for rule in rules for ok, sentence in rule() if not ok]

    def _rules_of_the_data(self) -> Iterator[tuple[bool, str]]:
        yield (
            bool(self.rec),
            'rec is not set: the folder of train.rec, a folder of class folders, or "synthetic"',
        )
        sets = [self.rec] if isinstance(self.rec, str) else self.rec or []
        yield (
            self.rec_weights is None or len(self.rec_weights) == len(sets),
            f"rec_weights={self.rec_weights!r}: one number above 0 for each of "
            f"{len(sets)} sets in rec",
        )
        lists = [self.exclude] if isinstance(self.exclude, str) else self.exclude
        yield (
            lists is None or len(lists) == len(sets),
            f'exclude={self.exclude!r}: one list for each of {len(sets)} sets in rec, "-" for none',
        )
        orders = [
            k for k in ("rec_weights", "samples_per_class", "shuffle_block") if getattr(self, k)
        ]
        yield len(orders) < 2, f"{', '.join(orders)}: each is an order of its own; choose one"
        yield (
            not self.samples_per_class or self.batch_size % self.samples_per_class == 0,
            f"samples_per_class={self.samples_per_class!r}: batch_size={self.batch_size!r} is no "
            "multiple of it",
        )
        if self.rec == "synthetic":
            for key in ("num_classes", "num_image"):
                is_number = getattr(self, key) != "auto"
                yield is_number, f'{key}="auto": rec="synthetic" needs a number'
            yield (
                not self.val_targets or self.val_dir is not None,
                f'val_targets={self.val_targets!r} with rec="synthetic": set val_dir, or '
                "val_targets=[]",
            )

    def _rules_of_the_model(self) -> Iterator[tuple[bool, str]]:
        yield (
            self.global_batch_size is None or self.gradient_acc == 1,
            f"global_batch_size={self.global_batch_size!r}: gradient_acc (here "
            f"{self.gradient_acc}) follows from it: leave that at 1",
        )
        yield (
            self.batch_size > 1 or self.freeze_batch_norm,
            "batch_size=1: batch norm needs two images or more per rank, or freeze_batch_norm=True",
        )
        yield (
            self.freeze_epoch <= self.num_epoch,
            f"freeze_epoch={self.freeze_epoch!r}: at most num_epoch={self.num_epoch}",
        )
        yield (
            self.warmup_epoch == -1 or 0 <= self.warmup_epoch <= self.num_epoch,
            f"warmup_epoch={self.warmup_epoch!r}: in [0, num_epoch={self.num_epoch}], or -1",
        )
        yield (
            not self.head_offload or (self.sample_rate < 1.0 and self.head_update == "fused"),
            "head_offload=True brings sampled class centers over: it needs sample_rate < 1 "
            f'(here {self.sample_rate:g}) and head_update="fused"',
        )
        yield (
            self.head_weight_dtype == "fp32" or self.head_update == "fused",
            'head_weight_dtype="bf16" needs head_update="fused"',
        )
        yield (
            self.margin is not None
            or self.loss not in ("arcface", "cosface", "sphereface", "subcenter_arcface")
            or self.margin_list == default_of("margin_list"),
            f"margin_list={self.margin_list!r} belongs to loss='combined': for "
            f"loss={self.loss!r} set margin=..., or leave loss out",
        )
        yield (
            self.margin is None or self.loss not in ("combined", "softmax", "normface", "magface"),
            f"margin={self.margin!r} has no meaning for loss={self.loss!r}: set margin_list or "
            "magface_margins, or leave margin=None",
        )
        yield (
            self.teacher is None or self.distillation != "logits" or self.loss != "softmax",
            'distillation="logits" compares cosines with class centers, which loss="softmax" does '
            'not train: distillation="cosine", or another loss',
        )

    def _rules_of_the_task(self) -> Iterator[tuple[bool, str]]:
        if self.task != "classification":
            yield (
                self.parallel_dim in (1, -1),
                f"parallel_dim={self.parallel_dim!r}: PartialFC splits classes (1); others are "
                'for task="classification", or ParallelArcLinear as a layer of your own',
            )
            yield (
                self.label_smoothing == 0.0,
                f'label_smoothing={self.label_smoothing!r}: only for task="classification"',
            )
            return
        yield (
            self.loss == "softmax",
            f'loss={self.loss!r}: task="classification" is plain softmax: loss="softmax"',
        )
        yield (
            self.rec is None or isinstance(self.rec, str),
            f"rec={self.rec!r}: classification takes one folder with train/ and val/, or "
            '"synthetic"',
        )
        yield (
            not self.val_targets,
            f"val_targets={self.val_targets!r} are pairs of faces: classification scores "
            "val/ (or val_dir) by itself",
        )
        yield not self.dali, 'dali=True: only for task="recognition"'
        yield (
            self.teacher is None,
            f'teacher={self.teacher!r}: distillation is for task="recognition"',
        )
        yield (
            self.ema_decay == 0.0,
            f"ema_decay={self.ema_decay!r} averages the backbone alone, and the last layer "
            'of task="classification" fits the features of the moment: leave it at 0',
        )
        low, high = self.crop_area
        yield (
            0.0 < low <= high <= 1.0,
            f"crop_area={self.crop_area!r}: in (0, 1], least first",
        )
        yield (
            (self.sub_centers or 1) == 1,
            f"sub_centers={self.sub_centers!r}: classification has one row per class",
        )
        if self.parallel_dim in (None, 0) or self.label_smoothing > 0:
            yield (
                self.init_head is None,
                f"init_head={self.init_head!r}: only with parallel_dim=1 and label_smoothing=0",
            )
            yield (
                self.sample_rate == 1.0
                and not self.head_offload
                and (self.head_weight_dtype, self.head_state_dtype) == ("fp32", "fp32"),
                f"parallel_dim={self.parallel_dim!r}, label_smoothing="
                f"{self.label_smoothing!r}: sample_rate < 1, head_offload and bf16 weights or "
                "state need parallel_dim=1 and label_smoothing=0",
            )

    def unused(self) -> list[str]:
        """Returns a sentence, for a warning, on each key that is set but has no effect.

        A key has no effect with another loss or without a teacher. Such keys may come from a
        published config whose loss was changed on the command line.
        """
        angular = ("combined", "arcface", "cosface", "sphereface", "subcenter_arcface")
        belongs_to = {
            "margin_list": ("combined",),
            "margin_gradient": angular,
            "interclass_filtering_threshold": angular,
            "scale": tuple(name for name in LOSSES if name != "softmax"),
            "softmax_bias": ("softmax",),
            "adaface_h": ("adaface",),
            "adaface_t_alpha": ("adaface",),
            "magface_norms": ("magface",),
            "magface_margins": ("magface",),
            "magface_lambda_g": ("magface",),
            "curricular_alpha": ("curricularface",),
            "elastic_std": ("elasticface_arc", "elasticface_cos"),
            "elastic_plus": ("elasticface_arc", "elasticface_cos"),
        }
        found = [*self._remarks]
        found += [
            f"{key}={getattr(self, key)!r} is not used: it belongs to {', '.join(losses)}, and the "
            f"loss is {self.loss}"
            for key, losses in belongs_to.items()
            if self.loss not in losses and getattr(self, key) != default_of(key)
        ]
        found += [
            f"{key}={getattr(self, key)!r} is not used: there is no teacher"
            for key in ("distillation", "distillation_weight", "distillation_temperature")
            if self.teacher is None and getattr(self, key) != default_of(key)
        ]
        return found


def default_of(key: str) -> Any:
    """Returns the default of a key."""
    return getattr(Config(), key)
