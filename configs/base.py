"""The schema of a run: every key with its type, default, meaning, unit and scope.

A run (`configs/<name>.py`, or a file of your own) states only how it differs from this.
`utils/config.py` applies the run and the command line to these defaults and calls
`Config.problems()`, which reports everything that is wrong at once.

The keys of InsightFace's arcface_torch keep their names. Where an old behavior was a bug, the key
does what its name says.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

TASKS = ("recognition", "classification")
PARALLEL_DIMS = (None, 0, 1, -1)
PRECISIONS = ("fp32", "tf32", "bf16", "fp16", "fp64")
GRAD_REDUCE_DTYPES = ("fp32", "bf16", "fp16")
ZERO_STAGES = (0, 1)
DISTILLATIONS = ("cosine", "logits")
MARGIN_GRADIENTS = ("exact", "straight_through")
FILTERING_MODES = ("remove", "legacy")
OPTIMIZERS = ("sgd", "adamw")
LOSSES = (
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
)
HEAD_UPDATES = ("fused", "autograd")
HEAD_KERNELS = ("auto", "triton", "torch")
HEAD_DTYPES = ("fp32", "bf16")
ON_BAD_RECORD = ("error", "skip")
WORKER_TYPES = ("threads", "processes")
ON_DIVERGENCE = ("stop", "rollback")
LR_SCHEDULES = ("polynomial", "cosine", "constant")


@dataclass
class Config:
    """All settings of one training run.

    The string below each field gives its meaning, unit and scope; `--help` prints it.
    """

    task: str = "recognition"
    """"recognition": a margin loss, with verification. "classification": plain softmax over the
    classes of a folder with train/ and val/, with top-1 and top-5 accuracy
    (docs/classification.md)."""

    # --- data -------------------------------------------------------------------------------
    rec: str | list[str] | None = None
    """Training set: a folder with train.rec and train.idx, a folder with one folder of images per
    identity, or "synthetic" for generated input. A list joins several sets: the classes of each set
    come after those of the one before. Required."""

    rec_weights: list[float] | None = None
    """Share of each set of `rec` in an epoch's images, as relative numbers. None: shares by
    size."""

    exclude: str | list[str] | None = None
    """Text file of images and classes to leave out (docs/data.md). With several sets, one file for
    each, "-" for none."""

    num_classes: int | str = "auto"
    """Number of identities C, over all ranks; "auto" reads it from `property` or the records. More
    than the labels need is allowed (padding); fewer is an error."""

    num_image: int | str = "auto"
    """Number of training images; "auto" counts them. A number that differs from the set is only
    reported in the log; with rec="synthetic" it is the size of the set."""

    samples_per_class: int = 0
    """Class-balanced sampling: every identity is drawn equally often, with this many of its images
    at a time in a batch; batch_size must be a multiple of it. 0: every image once per epoch."""

    shuffle_block: int = 0
    """Images per block of a block-wise shuffle, for spinning or network disks. 0: a random order of
    the whole set."""

    augment: list[str] = field(default_factory=list)
    """Augmentations besides flips: names (crop, resize, low_res, blur, hsv, gray, photometric,
    erase), each also with a probability ("erase=0.3"), or the sets "dali_aug" and "adaface"."""

    crop_area: tuple[float, float] = (0.08, 1.0)
    """Classification: smallest and largest share of an image's area in the random crop used for
    training, in (0, 1]; the crop's width / height lies in 3/4 to 4/3."""

    on_bad_record: str = "error"
    """"error" stops at an image that cannot be read and names it; "skip" counts it, logs it and
    replaces it by another of its batch."""

    num_workers: int = 2
    """Decoding threads per rank (DALI's, with dali=True); 0 decodes in the training thread."""

    worker_type: str = "threads"
    """"threads". The former "processes" is accepted with a warning, and threads are used."""

    dali: bool = False
    """Decode and augment with NVIDIA DALI, on the GPU if there is one, with the same order and the
    same draws. Where DALI is not installed, ArcShard's own reader is used, with a warning."""

    dali_aug: bool = False
    """The augmentation of the published DALI pipeline, together with dali=True. Without dali it has
    no effect, as in the published code; augment=[dali_aug] is the same set for either loader."""

    # --- model ------------------------------------------------------------------------------
    network: str = "r50"
    """Backbone, one of backbones.model_names()."""

    embedding_size: int = 512
    """Width D of the embedding."""

    input_size: int = 112
    """Height and width of the input images, in pixels."""

    dropout: float = 0.0
    """Probability of dropout before the embedding layer (IResNet), in [0, 1)."""

    drop_path_rate: float | None = None
    """ViT: stochastic depth of the last block, in [0, 1); it grows linearly from 0 at the first
    block. None: the value published under the network's name."""

    mask_ratio: float | None = None
    """ViT: share of patches that are removed from a training image, in [0, 1); at inference none
    are removed. None: the value published under the network's name."""

    gradient_checkpointing: bool = False
    """Recompute the backbone's stages in the backward pass: less memory, about a third slower."""

    init_backbone: str | None = None
    """Weights to start the backbone from: a model.pt, a run folder or an arcface_torch file. The
    log reports what matched; nothing matching is an error."""

    init_head: str | None = None
    """Class centers to start from: a run folder or one of its checkpoints. Identities that both
    label maps name keep their center and its optimizer state; new ones start at the mean embedding
    of their images (docs/fine_tuning.md)."""

    freeze_epoch: int = 0
    """Number of epochs at the start in which only the class centers are updated. The backbone and
    its batch-norm statistics stay as they are, and it works as at inference (no dropout, no
    masking)."""

    freeze_batch_norm: bool = False
    """Batch norm uses its running statistics and does not update them (for fine-tuning and
    proofs)."""

    teacher: str | None = None
    """Knowledge distillation: the run folder or model.pt of a frozen teacher. distillation="logits"
    needs its run folder, with checkpoints (docs/distillation.md)."""

    distillation: str = "cosine"
    """"cosine": 1 - cosine of the student's and the teacher's embedding. "logits": T^2 times the
    divergence of the student's class probabilities from the teacher's, without a margin in
    either."""

    distillation_weight: float = 1.0
    """Factor on the distillation loss, which is added to the head's; above 0. The log and
    metrics.jsonl show both losses separately, without this factor."""

    distillation_temperature: float = 4.0
    """distillation="logits": the temperature T, by which the logits of both sides are divided."""

    # --- head -------------------------------------------------------------------------------
    loss: str = "combined"
    """"combined" (configured by margin_list), or by name: "softmax", "normface", "arcface",
    "cosface", "sphereface", "adaface", "magface", "curricularface", "elasticface_arc",
    "elasticface_cos", "subcenter_arcface". The log prints the formula in force."""

    margin_list: tuple[float, float, float] = (1.0, 0.5, 0.0)
    """loss="combined": (m1, m2, m3) of cos(m1 theta + m2) - m3; m1 multiplies, m2 is in radians,
    m3 in units of cosine. ArcFace (1, m, 0), CosFace (1, 0, m), SphereFace (m, 0, 0)."""

    margin: float | None = None
    """The margin m of a loss by name, in the unit of that loss; None: the paper's value. Not for
    combined, softmax, normface and magface."""

    scale: float = 64.0
    """Factor s on the cosines before the softmax; loss="softmax" uses 1 instead."""

    margin_gradient: str = "exact"
    """"exact": the derivative of the margin. "straight_through": 1 instead, with which the
    published ArcFace weights were trained. For combined, arcface, cosface and sphereface."""

    softmax_bias: bool = True
    """loss="softmax": whether a bias per class is learned."""

    parallel_dim: int | None = 1
    """Classification: how the last layer is split over the ranks: 1 or -1 by classes, 0 by input
    features, None not at all (every rank holds all of it). Recognition: 1."""

    label_smoothing: float = 0.0
    """Classification: share of the target that is spread over all classes, in [0, 1). Above 0 the
    last layer's logits and gradients are whole tensors on each rank (docs/classification.md)."""

    adaface_h: float = 0.333
    """loss="adaface": the factor h on the standardized norms, which are clipped to [-1, 1] after
    it."""

    adaface_t_alpha: float = 0.01
    """loss="adaface": weight of a global batch in the running statistics of the norms."""

    magface_norms: tuple[float, float] = (10.0, 110.0)
    """loss="magface": lower and upper bound of the embeddings' norm, (l_a, u_a)."""

    magface_margins: tuple[float, float] = (0.45, 0.8)
    """loss="magface": margins at those bounds, (l_margin, u_margin), in radians."""

    magface_lambda_g: float = 20.0
    """loss="magface": weight of the regularizer."""

    curricular_alpha: float = 0.01
    """loss="curricularface": weight of a global batch in the running target cosine t."""

    elastic_std: float = 0.0125
    """loss="elasticface_*": standard deviation of the drawn margins."""

    elastic_plus: bool = False
    """loss="elasticface_*": ElasticFace+, which gives harder samples larger margins."""

    sub_centers: int | None = None
    """Centers per class, K; a class counts with its best one. None: 3 for subcenter_arcface, else
    1. Works with every loss."""

    sample_rate: float = 1.0
    """Share of each rank's class centers used per step, in [0, 1]; the batch's own classes are
    always included. 0: only the batch's classes."""

    interclass_filtering_threshold: float = 0.0
    """Other classes whose cosine exceeds this are taken for label noise; 0 switches it off."""

    interclass_filtering_mode: str = "remove"
    """"remove" removes filtered classes from the softmax; "legacy" sets their cosine to 0, as the
    published code did."""

    head_update: str = "fused"
    """"fused": blocks of classes, without a B x C matrix or a C x D gradient. "autograd": the
    reference path with an ordinary gradient, slower and larger."""

    head_workspace_mib: int | str = "auto"
    """Memory of the fused head per rank, in MiB, beside class centers, their state and O(global
    batch). More memory keeps more from forward to backward, which is faster. "auto": an eighth of a
    GPU's memory, or less where all softmax numerators are kept with less; 256 MiB on a CPU."""

    head_kernels: str = "auto"
    """"auto" and "triton": Triton kernels do what is not a plain matmul in the fused head, on GPUs
    of compute capability 8.0 or higher with bf16 (see precision). "torch": PyTorch does it, as
    everywhere else. The log says which, and why."""

    head_offload: bool = False
    """Keep class centers and their optimizer state in host memory and copy the sampled ones to the
    device in each step (needs sample_rate < 1). False: they are on the training device."""

    head_weight_dtype: str = "fp32"
    """"fp32", or "bf16": class centers in half the memory, with stochastic rounding."""

    head_state_dtype: str = "fp32"
    """"fp32", or "bf16": momentum or Adam's averages of the class centers in half the memory, with
    stochastic rounding."""

    # --- optimization -----------------------------------------------------------------------
    batch_size: int = 128
    """Images per rank and micro-step. Global batch = batch_size x world size x gradient_acc."""

    global_batch_size: int | None = None
    """Images per optimizer step over all ranks. If set, it stays the same on any number of ranks:
    each rank takes its share in as many micro-steps as it needs, with at most batch_size images at
    a time."""

    gradient_acc: int = 1
    """Micro-steps per optimizer step; one step equals the step on the whole global batch."""

    num_epoch: int = 20
    """Passes over the training set."""

    max_steps: int | None = None
    """Stop after this many optimizer steps; the schedule still spans num_epoch. None: no limit."""

    optimizer: str = "sgd"
    """"sgd" (with momentum) or "adamw", for backbone and head."""

    lr: float = 0.1
    """Peak learning rate of backbone and head, per optimizer step."""

    lr_base_batch: int | None = None
    """If set, the learning rate is lr x global batch / lr_base_batch (linear scaling)."""

    lr_schedule: str = "polynomial"
    """"polynomial" (power 2, to 0), "cosine" (to 0) or "constant", after the warm-up."""

    warmup_epoch: float = 0.0
    """Epochs of linear warm-up from zero; 0 or -1: none."""

    momentum: float = 0.9
    """Momentum of SGD, in [0, 1)."""

    weight_decay: float = 5e-4
    """Weight decay of backbone and head: coupled for sgd, decoupled for adamw."""

    decay_norms_and_biases: bool = True
    """Whether weight_decay also applies to the backbone's norms, biases and other vectors, as in
    the published runs."""

    layer_decay: float = 1.0
    """Learning rate of each stage or block of the backbone relative to the one after it, in (0, 1];
    the embedding layer has lr. 1: the same learning rate everywhere."""

    ema_decay: float = 0.0
    """Exponential moving average of the backbone: share of the old average kept per optimizer step,
    in [0, 1). It is less in the first steps: min(ema_decay, (1 + n) / (10 + n)) after n steps. The
    average is what is verified and saved (model.pt, model_best.pt); training continues with the
    weights themselves. Recognition only. 0: off."""

    zero_stage: int = 0
    """1: shard the backbone's optimizer state over the ranks (ZeroRedundancyOptimizer). Checkpoints
    and results are the same; each step broadcasts the parameters. 0: every rank holds all of it."""

    clip_grad_norm: float = 5.0
    """Largest norm of the backbone's gradient, which is clipped to it; 0 switches clipping off."""

    on_divergence: str = "stop"
    """"stop", or "rollback": return to the last good checkpoint and leave out the data that led to
    the divergence."""

    max_rollbacks: int = 3
    """on_divergence="rollback": largest number of rollbacks, after which the run stops."""

    max_bad_steps: int = 20
    """Number of consecutive steps with a non-finite loss, which update nothing, after which the run
    stops with exit code 3. Checked at log steps."""

    # --- precision and devices --------------------------------------------------------------
    precision: str | None = None
    """"fp32" (full, no TF32), "tf32", "bf16", "fp16" (with a loss scaler) or "fp64" (for proofs).
    None: what `fp16` asks for, else bf16 on GPUs that support it and fp32 elsewhere."""

    fp16: bool = False
    """arcface_torch's switch: fp16 with a loss scaler on CUDA. On a CPU, where half precision is
    often slower, fp32 with one warning. An explicit `precision` takes precedence."""

    channels_last: bool = True
    """Images and convolutions in channels_last memory format; the results are the same up to
    rounding."""

    compile: bool = False
    """torch.compile of the backbone's training step, for its fixed shapes. The start takes minutes
    longer; the log says how long. Needs a C++ compiler on CPUs."""

    static_graph: bool = False
    """Tell DistributedDataParallel that every step uses the same parameters in the same order."""

    grad_reduce_dtype: str = "fp32"
    """Dtype in which ranks sum the backbone's gradients: "fp32", or "bf16" and "fp16" with half the
    traffic. arcface_torch always used fp16."""

    device: str = "auto"
    """"auto" (CUDA if there is one), "cuda" or "cpu"."""

    collective_timeout_s: float = 600.0
    """Seconds without progress after which the run ends with exit code 5 and names the ranks that
    lag behind."""

    seed: int = 2048
    """Seed of initial weights, class sampling, image order and augmentation."""

    # --- verification during training -------------------------------------------------------
    val_targets: list[str] = field(default_factory=list)
    """Verification sets (names of .bin files in val_dir) scored during training and at the end. A
    missing one is an error before training starts."""

    val_dir: str | None = None
    """Folder of the .bin files. None: the training set's folder."""

    val_batch_size: int = 64
    """Images per rank that are embedded at a time in verification."""

    # --- the run ----------------------------------------------------------------------------
    output: str | None = None
    """Folder of the run's files. None: work_dirs/<config name>."""

    resume: bool | str = False
    """Resume from a checkpoint: "auto" (or True) takes the newest intact one in `output`, if there
    is one; a path takes that one. False starts from the beginning, except where torchrun has
    restarted the ranks of this run: they resume as with "auto". "never" starts from the beginning
    even then. docs/checkpoints.md says which settings may change in between."""

    checkpoint_every: int = 0
    """Optimizer steps between two checkpoints; 0: none by steps. The ends of epochs, a new best
    accuracy and the end of the run are saved in any case."""

    checkpoint_minutes: float = 15.0
    """Minutes between two checkpoints; 0: none by time."""

    keep_checkpoints: int = 3
    """Number of newest checkpoints that are kept; the best one is kept as well. 0: none are
    written, except when a signal stops the run."""

    max_failed_saves: int = 3
    """Number of consecutive checkpoints that could not be written after which the run stops with
    exit code 6; before that it continues."""

    save_all_states: bool = False
    """arcface_torch's switch for complete checkpoints. They are always on; keep_checkpoints=0
    switches them off."""

    frequent: int = 10
    """Optimizer steps between two log lines."""

    verbose: int = 2000
    """Optimizer steps between two verifications; 0: none during training, only the one at the
    end."""

    profile: int = 0
    """Number of steps to profile, after the first five. A trace and a page on where their time goes
    are written to profile/ of the output. 0: none."""

    notes: str = ""
    """Free text, saved in config.json."""

    # --- Weights & Biases (optional) --------------------------------------------------------
    using_wandb: bool = False
    """Log to Weights & Biases as well; the key comes from the environment (WANDB_API_KEY)."""

    wandb_key: str | None = None
    """Ignored, because a key in a file ends up in logs. Set WANDB_API_KEY or run `wandb login`."""

    wandb_entity: str | None = None
    """Entity (team or user) of the run."""

    wandb_project: str | None = None
    """Project of the run."""

    wandb_resume: bool = False
    """Let wandb continue the run of the same id."""

    wandb_log_all: bool = True
    """True: every rank logs, in one group. False: rank 0 only."""

    suffix_run_name: str | None = None
    """Text appended to the run's name."""

    save_artifacts: bool = False
    """Upload model.pt as an artifact at the end."""

    def problems(self) -> list[str]:
        """Returns everything wrong with the values and their combination, one sentence each.

        Types are checked before, in utils/config.py. What needs files, networks or devices (whether
        the set exists, whether there is a GPU) is checked by training/build.py.
        """
        found: list[str] = []

        def require(ok: bool, sentence: str) -> None:
            if not ok:
                found.append(sentence)

        def one_of(key: str, allowed: tuple[str | int, ...]) -> None:
            value = getattr(self, key)
            require(
                value in allowed, f"{key}={value!r}: allowed are {', '.join(map(str, allowed))}"
            )

        def at_least(key: str, low: int) -> None:
            value = getattr(self, key)
            require(value >= low, f"{key}={value!r}: at least {low}")

        one_of("task", TASKS)
        one_of("margin_gradient", MARGIN_GRADIENTS)
        one_of("interclass_filtering_mode", FILTERING_MODES)
        one_of("optimizer", OPTIMIZERS)
        one_of("loss", LOSSES)
        one_of("head_update", HEAD_UPDATES)
        one_of("head_kernels", HEAD_KERNELS)
        one_of("head_weight_dtype", HEAD_DTYPES)
        one_of("head_state_dtype", HEAD_DTYPES)
        one_of("lr_schedule", LR_SCHEDULES)
        one_of("on_bad_record", ON_BAD_RECORD)
        one_of("worker_type", WORKER_TYPES)
        one_of("device", ("auto", "cuda", "cpu"))
        one_of("on_divergence", ON_DIVERGENCE)
        one_of("grad_reduce_dtype", GRAD_REDUCE_DTYPES)
        one_of("zero_stage", ZERO_STAGES)
        one_of("distillation", DISTILLATIONS)
        if self.precision is not None:
            one_of("precision", PRECISIONS)
        for key, low in (
            ("batch_size", 1),
            ("gradient_acc", 1),
            ("num_epoch", 1),
            ("frequent", 1),
            ("embedding_size", 1),
            ("input_size", 16),
            ("num_workers", 0),
            ("verbose", 0),
            ("profile", 0),
            ("samples_per_class", 0),
            ("shuffle_block", 0),
            ("checkpoint_every", 0),
            ("keep_checkpoints", 0),
            ("max_failed_saves", 1),
            ("checkpoint_minutes", 0),
            ("max_rollbacks", 0),
            ("collective_timeout_s", 1),
            ("max_bad_steps", 1),
            ("val_batch_size", 1),
            ("seed", 0),
            ("freeze_epoch", 0),
        ):
            at_least(key, low)

        for key, value in vars(self).items():
            for number in value if isinstance(value, (tuple, list)) else (value,):
                if isinstance(number, float) and not math.isfinite(number):
                    found.append(f"{key}={value!r}: a finite number is needed")

        require(
            bool(self.rec),
            'rec is not set: the folder of train.rec, a folder of class folders, or "synthetic"',
        )
        sets = [self.rec] if isinstance(self.rec, str) else self.rec or []
        require(
            self.rec_weights is None
            or (len(self.rec_weights) == len(sets) and all(w > 0 for w in self.rec_weights)),
            f"rec_weights={self.rec_weights!r}: one number above 0 for each of {len(sets)} sets",
        )
        lists = [self.exclude] if isinstance(self.exclude, str) else self.exclude
        require(
            lists is None or len(lists) == len(sets),
            f'exclude={self.exclude!r}: one list for each of {len(sets)} sets, "-" for none',
        )
        require(
            self.global_batch_size is None
            or (self.global_batch_size >= 1 and self.gradient_acc == 1),
            f"global_batch_size={self.global_batch_size!r}: at least 1, and gradient_acc (here "
            f"{self.gradient_acc}) follows from it: leave that at 1",
        )
        orders = [
            k for k in ("rec_weights", "samples_per_class", "shuffle_block") if getattr(self, k)
        ]
        require(len(orders) < 2, f"{', '.join(orders)}: each is an order of its own; choose one")
        require(
            not self.samples_per_class or self.batch_size % self.samples_per_class == 0,
            f"samples_per_class={self.samples_per_class!r}: batch_size={self.batch_size!r} is no "
            "multiple of it",
        )
        for key in ("num_classes", "num_image"):
            value = getattr(self, key)
            require(
                value == "auto" or (isinstance(value, int) and value >= 1),
                f'{key}={value!r}: a whole number of at least 1, or "auto"',
            )
            if self.rec == "synthetic":
                require(value != "auto", f'{key}="auto": rec="synthetic" needs a number')
        mib = self.head_workspace_mib
        require(
            mib == "auto" or (isinstance(mib, int) and mib >= 1),
            f'head_workspace_mib={mib!r}: a whole number of at least 1, or "auto"',
        )
        require(
            self.sub_centers is None or self.sub_centers >= 1,
            f"sub_centers={self.sub_centers!r}: at least 1, or None",
        )
        require(
            not self.head_offload or (self.sample_rate < 1.0 and self.head_update == "fused"),
            f"head_offload=True brings sampled class centers over: it needs sample_rate < 1 "
            f'(here {self.sample_rate:g}) and head_update="fused"',
        )
        require(
            self.head_weight_dtype == "fp32" or self.head_update == "fused",
            'head_weight_dtype="bf16" needs head_update="fused"',
        )
        require(
            self.margin is not None
            or self.loss not in ("arcface", "cosface", "sphereface", "subcenter_arcface")
            or self.margin_list == Config.margin_list,
            f"margin_list={self.margin_list!r} belongs to loss='combined': for "
            f"loss={self.loss!r} set margin=..., or leave loss out",
        )
        require(
            self.margin is None or self.loss not in ("combined", "softmax", "normface", "magface"),
            f"margin={self.margin!r} has no meaning for loss={self.loss!r}: set margin_list or "
            "magface_margins, or leave margin=None",
        )
        require(self.seed < 2**63, f"seed={self.seed!r}: below 2**63")
        require(
            self.batch_size > 1 or self.freeze_batch_norm,
            "batch_size=1: batch norm needs two images or more per rank, or freeze_batch_norm=True",
        )
        require(0.0 <= self.sample_rate <= 1.0, f"sample_rate={self.sample_rate!r}: in [0, 1]")
        require(0.0 <= self.dropout < 1.0, f"dropout={self.dropout!r}: in [0, 1)")
        require(0.0 <= self.momentum < 1.0, f"momentum={self.momentum!r}: in [0, 1)")
        for key in ("drop_path_rate", "mask_ratio"):
            value = getattr(self, key)
            require(value is None or 0.0 <= value < 1.0, f"{key}={value!r}: in [0, 1), or None")
        require(0.0 <= self.ema_decay < 1.0, f"ema_decay={self.ema_decay!r}: in [0, 1)")
        require(0.0 < self.layer_decay <= 1.0, f"layer_decay={self.layer_decay!r}: in (0, 1]")
        require(
            self.freeze_epoch <= self.num_epoch,
            f"freeze_epoch={self.freeze_epoch!r}: at most num_epoch={self.num_epoch}",
        )
        for key in ("distillation_weight", "distillation_temperature"):
            require(getattr(self, key) > 0.0, f"{key}={getattr(self, key)!r}: above 0")
        require(
            self.teacher is None or self.distillation != "logits" or self.loss != "softmax",
            'distillation="logits" compares cosines with class centers, which loss="softmax" does '
            'not train: distillation="cosine", or another loss',
        )
        require(self.weight_decay >= 0.0, f"weight_decay={self.weight_decay!r}: at least 0")
        require(self.lr >= 0.0, f"lr={self.lr!r}: at least 0")
        require(self.clip_grad_norm >= 0.0, f"clip_grad_norm={self.clip_grad_norm!r}: at least 0")
        require(self.scale > 0.0, f"scale={self.scale!r}: above 0")
        require(
            0.0 <= self.interclass_filtering_threshold <= 1.0,
            f"interclass_filtering_threshold={self.interclass_filtering_threshold!r}: a cosine "
            "in (0, 1], 0 for off",
        )
        require(
            self.lr_base_batch is None or self.lr_base_batch >= 1,
            f"lr_base_batch={self.lr_base_batch!r}: at least 1, or None",
        )
        require(
            self.max_steps is None or self.max_steps >= 0,
            f"max_steps={self.max_steps!r}: at least 0, or None",
        )
        require(
            self.warmup_epoch == -1 or 0 <= self.warmup_epoch <= self.num_epoch,
            f"warmup_epoch={self.warmup_epoch!r}: in [0, num_epoch={self.num_epoch}], or -1",
        )
        m1, m2, m3 = self.margin_list
        require(m1 > 0, f"margin_list m1={m1!r}: above 0")
        require(0 <= m2 < math.pi, f"margin_list m2={m2!r}: radians in [0, pi)")
        require(0 <= m3 <= 2, f"margin_list m3={m3!r}: in [0, 2]")
        require(
            self.parallel_dim in PARALLEL_DIMS,
            f"parallel_dim={self.parallel_dim!r}: None, 0, 1 or -1",
        )
        found += self._problems_of_the_task()
        if self.val_targets and self.rec == "synthetic":
            require(
                self.val_dir is not None,
                f'val_targets={self.val_targets!r} with rec="synthetic": set val_dir, or '
                "val_targets=[]",
            )
        return found

    def _problems_of_the_task(self) -> list[str]:
        """Returns what task="classification" needs, or what only that task has."""
        sentences: list[tuple[bool, str]]
        if self.task != "classification":
            sentences = [
                (
                    self.parallel_dim in (1, -1),
                    f"parallel_dim={self.parallel_dim!r}: PartialFC splits classes (1); others are "
                    'for task="classification", or ParallelArcLinear as a layer of your own',
                ),
                (
                    self.label_smoothing == 0.0,
                    f'label_smoothing={self.label_smoothing!r}: only for task="classification"',
                ),
            ]
        else:
            low, high = self.crop_area
            is_layer = self.parallel_dim in (None, 0) or self.label_smoothing > 0
            sentences = [
                (
                    self.loss == "softmax",
                    f'loss={self.loss!r}: task="classification" is plain softmax: loss="softmax"',
                ),
                (
                    self.rec is None or isinstance(self.rec, str),
                    f"rec={self.rec!r}: classification takes one folder with train/ and val/, or "
                    '"synthetic"',
                ),
                (
                    not self.val_targets,
                    f"val_targets={self.val_targets!r} are pairs of faces: classification scores "
                    "val/ (or val_dir) by itself",
                ),
                (not self.dali, 'dali=True: only for task="recognition"'),
                (
                    self.teacher is None,
                    f'teacher={self.teacher!r}: distillation is for task="recognition"',
                ),
                (
                    self.ema_decay == 0.0,
                    f"ema_decay={self.ema_decay!r} averages the backbone alone, and the last layer "
                    'of task="classification" fits the features of the moment: leave it at 0',
                ),
                (
                    0.0 <= self.label_smoothing < 1.0,
                    f"label_smoothing={self.label_smoothing!r}: in [0, 1)",
                ),
                (0.0 < low <= high <= 1.0, f"crop_area={self.crop_area!r}: in (0, 1], least first"),
                (
                    (self.sub_centers or 1) == 1,
                    f"sub_centers={self.sub_centers!r}: classification has one row per class",
                ),
                (
                    not is_layer or self.init_head is None,
                    f"init_head={self.init_head!r}: only with parallel_dim=1 and label_smoothing=0",
                ),
                (
                    not is_layer
                    or (
                        self.sample_rate == 1.0
                        and not self.head_offload
                        and (self.head_weight_dtype, self.head_state_dtype) == ("fp32", "fp32")
                    ),
                    f"parallel_dim={self.parallel_dim!r}, label_smoothing="
                    f"{self.label_smoothing!r}: sample_rate < 1, head_offload and bf16 weights or "
                    "state need parallel_dim=1 and label_smoothing=0",
                ),
            ]
        return [sentence for ok, sentence in sentences if not ok]

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
        found = [
            f"{key}={getattr(self, key)!r} is not used: it belongs to {', '.join(losses)}, and the "
            f"loss is {self.loss}"
            for key, losses in belongs_to.items()
            if self.loss not in losses and getattr(self, key) != getattr(Config, key)
        ]
        found += [
            f"{key}={getattr(self, key)!r} is not used: there is no teacher"
            for key in ("distillation", "distillation_weight", "distillation_temperature")
            if self.teacher is None and getattr(self, key) != getattr(Config, key)
        ]
        return found
