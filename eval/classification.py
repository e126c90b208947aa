"""Top-1 and top-5 of a classifier on a folder of images, on all ranks together.

Each rank scores its share of the images; only counts are summed over ranks. During training,
`classify` asks the sharded head for the rank of each image's class. The command evaluates only: a
run, its model.pt, or weights as torchvision publishes them.

    python -m eval.classification --model work_dirs/imagenet_r50 --data /data/imagenet
    python -m eval.classification --model resnet50-0676ba61.pth --network resnet50 --data ...
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from arcshard.head.ranking import logit_rank
from data.crop import ImageFolder
from data.datasets import DataError, list_class_names
from eval.cli import (
    add_model_options,
    check_outputs,
    choose_dist_context,
    open_models,
    run_command,
    write_json,
)
from eval.extract import (
    Embed,
    OtherRankFailed,
    Progress,
    embedded_batches,
    share_of_batches,
)
from utils.errors import UserError

Places = Callable[[Tensor, Tensor], Tensor]
"""(outputs [b, width], labels [b]) -> [b] int64, the number of classes above each row's own."""

TOP = (1, 5)


def classify(
    embed: Embed,
    sets: Sequence[ImageFolder],
    *,
    places: Places = logit_rank,
    width: int | None = None,
    rank: int = 0,
    world_size: int = 1,
    group: dist.ProcessGroup | None = None,
    batch_size: int = 64,
    input_size: int = 224,
    show_progress: bool = False,
) -> dict[str, dict[str, float]]:
    """Scores a model on sets of images; all ranks of `group` call it together.

    All ranks get the same result.

    Args:
        embed: uint8 RGB [n, 3, input_size, input_size] -> [n, width], logits or what `places`
            takes. Every rank must have the same weights.
        sets: The same sets on every rank.
        places: Ranks of the labels among logits, or of a head whose ranks work together
            (`target_rank`). It is called equally often on all ranks.
        width: Width of `embed`'s outputs; needed if `places` works over ranks.
        rank: This rank.
        world_size: Number of ranks; torch.distributed is used only if it is more than 1.
        group: Process group of the ranks.
        batch_size: Images per call of `embed`.
        input_size: Is not used; each set has its own.
        show_progress: Whether progress is shown on stderr.

    Returns:
        {set: {"top1", "top5", "num_images"}} with shares in [0, 1]; top5 of 5 classes is 1.

    Raises:
        UserError: An argument or an image cannot be used. An error of one rank raises there.
        OtherRankFailed: Another rank failed; the message names it. No rank is left waiting.
    """
    results = {}
    for one in sets:
        share = _Share(one, rank, world_size, batch_size)
        progress = Progress(share.num_own, f"classifying {one.name}", show_progress)
        counts = torch.zeros(1 + len(TOP), dtype=torch.int64)  # images, and right ones by k
        for outputs, labels, is_counted in share.outputs(embed, width or one.num_classes):
            found = places(outputs, labels).cpu()  # [b]
            if is_counted:
                counts += torch.tensor([len(found), *(int((found < k).sum()) for k in TOP)])
                progress.add(len(found))
        progress.close()
        num_images, *right = _sum(counts, share.failure, one.name, world_size, group).tolist()
        results[one.name] = {
            **{f"top{k}": count / num_images for k, count in zip(TOP, right, strict=True)},
            "num_images": num_images,
        }
    return results


class _Share:
    """One rank's images of a set, in as many batches as any rank has.

    A rank that has fewer batches, or whose images fail, continues with one row that is not counted,
    because the others would wait for it. The failure is kept.
    """

    def __init__(self, one: ImageFolder, rank: int, world_size: int, batch_size: int) -> None:
        self.one, self.batch_size, self.is_alone = one, batch_size, world_size == 1
        shares = [share_of_batches(len(one), batch_size, r, world_size) for r in range(world_size)]
        self.num_batches = max(-(-(share.end - share.start) // batch_size) for share in shares)
        self.own = range(*shares[rank])
        self.num_own = len(self.own)
        self.failure: Exception | None = None

    def outputs(self, embed: Embed, width: int) -> Iterator[tuple[Tensor, Tensor, bool]]:
        """Yields outputs [b, width] and labels [b] of every batch, and whether they count."""
        size = self.one.input_size
        batches = embedded_batches(
            embed,
            self.one,
            range(self.own.start, self.own.stop, self.batch_size),
            name=self.one.name,
            flip=False,
            batch_size=self.batch_size,
            input_size=size,
        )
        nothing = torch.zeros(1, width), torch.zeros(1, dtype=torch.int64), False
        for _ in range(self.num_batches):
            if self.failure is not None:
                yield nothing
                continue
            try:
                first, rows = next(batches, (0, None))
            except Exception as error:
                if self.is_alone:
                    raise
                self.failure, rows = error, None
            if rows is None:
                yield nothing
            else:
                labels = torch.from_numpy(self.one.labels[first : first + len(rows)])
                yield torch.from_numpy(rows), labels, True


def _sum(
    counts: Tensor,
    failure: Exception | None,
    name: str,
    world_size: int,
    group: dist.ProcessGroup | None,
) -> Tensor:
    """Sums counts over all ranks; if one has failed, every rank raises."""
    if world_size == 1:
        return counts
    failed = torch.zeros(world_size, dtype=torch.int64)
    failed[dist.get_rank(group)] = failure is not None
    total = torch.cat([counts, failed])
    if "nccl" in dist.get_backend(group):
        total = total.cuda()
    dist.all_reduce(total, group=group)
    counts, failed = total.cpu().split([len(counts), world_size])
    if failure is not None:
        raise failure
    if failed.any():
        ranks = ", ".join(map(str, failed.nonzero().flatten().tolist()))
        raise OtherRankFailed(
            f"classifying {name} failed on rank {ranks}; the error raised there says why"
        )
    return counts


def open_image_folder(
    folder: str | Path, input_size: int, short_side: int | None = None
) -> ImageFolder:
    """Opens the images to score in a folder.

    They are in val/ and labeled as the class folders of train/ are numbered. Without val/ they are
    in the folder's own class folders in sorted order.

    Args:
        folder: The folder.
        input_size: Height and width that the network takes.
        short_side: See `data.crop.center_crop`.

    Raises:
        DataError: A folder is missing, or train/ lacks a class of val/.
    """
    folder = Path(folder)
    val = folder / "val" if (folder / "val").is_dir() else folder
    train = folder / "train"
    names = list_class_names(train) if train.is_dir() else None
    if names is not None and val == folder:
        raise DataError(f"{folder} has train/ but no val/: put the pictures to score there")
    return ImageFolder(val, input_size, names, short_side)


# --------------------------------------------------------------------------------------------
# The command
# --------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns the exit code (2 for wrong input, as in argparse)."""
    parser = argparse.ArgumentParser(
        prog="python -m eval.classification", description="Top-1 and top-5 of a classifier."
    )
    add_model_options(parser)
    add = parser.add_argument
    add("--data", required=True, help="folder with train/ and val/, or of class folders alone")
    add(
        "--resize",
        type=int,
        help="short side in pixels before the middle is cut out (default: 256 for 224)",
    )
    add("--json", type=Path, help="write the result there")
    options = parser.parse_args(arguments)
    return run_command(lambda: _evaluate(options))


def _evaluate(options: argparse.Namespace) -> int:
    check_outputs({"--json": options.json})
    if options.cache is not None:
        raise UserError("--cache keeps embeddings; there are none here: leave it out")
    world = choose_dist_context(options.device)
    (model,) = open_models(options, world)
    if options.resize is not None and options.resize < model.input_size:
        raise UserError(f"--resize {options.resize}: at least the model's {model.input_size}")
    pictures = open_image_folder(options.data, model.input_size, options.resize)
    is_sure = (Path(options.data) / "train").is_dir()

    def embed(images: Tensor) -> Tensor:
        logits = model.embed(images)
        num_classes = logits.shape[1]
        if pictures.num_classes > num_classes or (
            pictures.num_classes < num_classes and not is_sure
        ):
            raise UserError(
                f"{options.data} has {pictures.num_classes} class folders, and the model gives "
                f"{num_classes} numbers: which class is which is not known. Give the folder that "
                "has train/ beside val/, or a classifier (not a face model)"
            )
        return logits

    results = classify(
        embed,
        [pictures],
        rank=world.rank,
        world_size=world.world_size,
        batch_size=options.batch_size,
        show_progress=world.is_main,
    )
    if world.is_main:
        print(format_results(results))
        if options.json:
            content: dict[str, Any] = {**results, "model": model.facts}
            write_json(content, options.json)
    return 0


def format_results(results: dict[str, dict[str, float]]) -> str:
    """Formats one line per set."""
    return "\n".join(
        f"{name}: {one['num_images']:,} pictures, top-1 {one['top1']:.5f}, top-5 {one['top5']:.5f}"
        for name, one in results.items()
    )


if __name__ == "__main__":
    sys.exit(main())
