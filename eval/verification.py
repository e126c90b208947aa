"""Face verification on `.bin` sets: read them safely, embed on all ranks together, score.

The story: `find_verification_sets` before training starts (a missing target is an error there,
not after a day), `load_verification_set` once, `verify` whenever the loop asks. The scoring is
in `eval.metrics`; the same as a command: `python -m eval.verification --help`.
"""

import argparse
import json
import logging
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from backbones.weights import WeightsError, load_model
from data.decode import ImageError, decode_image, image_size
from eval.embedder import Embedder
from eval.metrics import pair_distances, roc_curve, verification_metrics
from eval.safe_pickle import PickledArray, PickleRefused, read_plain_pickle

logger = logging.getLogger(__name__)

Embed = Callable[[Tensor], Tensor]
VerificationResult = dict[str, float]

MIN_PAIRS = 10
"""The 10-fold protocol needs a pair per fold."""

_PLOT_SUFFIXES = (".png", ".pdf", ".svg")


class VerificationSetError(ValueError):
    """A verification set that is missing, malformed, or holds what it must not."""


@dataclass(frozen=True)
class VerificationSet:
    """N pairs of faces, held as they were stored: about 10 kB an image instead of 150.

    `images` has 2N entries, 2i and 2i + 1 being pair i: encoded files, as bytes or as uint8 arrays
    [length], or uint8 RGB pixels [H, W, 3]. `issame` is bool [N].
    """

    name: str
    images: list[bytes | NDArray[np.uint8]]
    issame: NDArray[np.bool_]

    @property
    def num_pairs(self) -> int:
        return len(self.issame)


# --------------------------------------------------------------------------------------------
# Files
# --------------------------------------------------------------------------------------------


def find_verification_sets(val_dir: str | Path, targets: Iterable[str]) -> list[Path]:
    """Paths of the `.bin` files of `targets` ("lfw" or "lfw.bin") in `val_dir`, in their order.

    Raises VerificationSetError naming every missing target, the directory that was searched and
    the sets that are there; also for a target named twice.
    """
    directory = Path(val_dir)
    names = [target.removesuffix(".bin") for target in targets]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise VerificationSetError(f"verification targets named twice: {', '.join(repeated)}")
    paths = [directory / f"{name}.bin" for name in names]
    missing = [path.stem for path in paths if not path.is_file()]
    if missing:
        if directory.is_dir():
            there = ", ".join(sorted(path.stem for path in directory.glob("*.bin"))) or "none"
            found = f"sets there: {there}"
        else:
            found = "no such directory"
        raise VerificationSetError(
            f"verification targets not found: {', '.join(missing)} (searched {directory} for "
            f"<target>.bin; {found}). Put the files there, point val_dir at them, or shorten "
            "val_targets"
        )
    return paths


def load_verification_set(
    path: str | Path, name: str | None = None, input_size: int | None = None
) -> VerificationSet:
    """Read a `.bin` set: a pickle of (2N images, N labels). `name` defaults to the file's stem.

    With `input_size` (pixels) every image's header is read too, so that a set of another size is
    an error now and not at the first evaluation.

    Reads what InsightFace ships (Python 2 pickles included) and what `scripts/pack.py --pairs`
    writes. The pickle may hold lists, tuples, bytes, booleans, 0 and 1, and numpy arrays of plain
    integers; nothing in it is ever executed. Anything else, and any structure but that one,
    raises VerificationSetError naming the file.
    """
    path = Path(path)
    if not path.is_file():
        raise VerificationSetError(f"{path}: no such file; give the path of a .bin set")
    try:
        content = read_plain_pickle(path)
    except PickleRefused as error:
        raise VerificationSetError(str(error)) from error
    if not isinstance(content, (list, tuple)) or len(content) != 2:
        raise VerificationSetError(
            f"{path}: holds {_kind(content)}; a set is a pair (list of 2N images, list of N labels)"
        )
    issame = _read_labels(path, content[1])
    images = _read_images(path, content[0])
    if len(images) != 2 * len(issame):
        raise VerificationSetError(
            f"{path}: {len(images)} images for {len(issame)} labels; "
            "there must be two images per label"
        )
    if len(issame) < MIN_PAIRS:
        raise VerificationSetError(
            f"{path}: {len(issame)} pairs; the 10-fold protocol needs at least {MIN_PAIRS}"
        )
    if input_size is not None:
        _check_sizes(path, images, input_size)
    return VerificationSet(name or path.stem, images, issame)


def _check_sizes(path: Path, images: list[bytes | NDArray[np.uint8]], input_size: int) -> None:
    for index, image in enumerate(images):
        where = f"{path}, image {index}"
        if isinstance(image, bytes) or image.ndim == 1:
            try:
                height, width = image_size(memoryview(image), where)
            except ImageError as error:
                raise VerificationSetError(str(error)) from error
        else:
            height, width = image.shape[:2]
        if (height, width) != (input_size, input_size):
            raise VerificationSetError(
                f"{where}: {height} x {width} pixels; the model takes {input_size} x {input_size}. "
                "Pack the set again at that size"
            )


def _read_labels(path: Path, labels: Any) -> NDArray[np.bool_]:
    if isinstance(labels, PickledArray):
        if labels.array.ndim == 1 and np.isin(labels.array, (0, 1)).all():
            return labels.array.astype(np.bool_)
        labels = labels.array
    if not isinstance(labels, (list, tuple)):
        raise VerificationSetError(f"{path}: labels are {_kind(labels)}; allowed is a list")
    for index, label in enumerate(labels):
        if not (isinstance(label, (bool, int)) and label in (0, 1)):
            raise VerificationSetError(
                f"{path}: label {index} is {_kind(label)}; allowed are True and False"
            )
    return np.array(labels, dtype=np.bool_)


def _read_images(path: Path, images: Any) -> list[bytes | NDArray[np.uint8]]:
    if isinstance(images, PickledArray) and images.array.ndim == 4:  # [2N, H, W, 3]
        images = list(images.array)
    if not isinstance(images, (list, tuple)):
        raise VerificationSetError(f"{path}: images are {_kind(images)}; allowed is a list")
    return [_read_image(path, index, image) for index, image in enumerate(images)]


def _read_image(path: Path, index: int, image: Any) -> bytes | NDArray[np.uint8]:
    if isinstance(image, PickledArray):
        image = image.array
    if isinstance(image, np.ndarray) and image.dtype == np.uint8:
        if image.ndim == 3 and image.shape[2] == 3 and image.size:
            return image
        if image.ndim == 1 and image.size:
            return image
    elif isinstance(image, bytes) and image:
        return image
    elif isinstance(image, bytearray) and image:
        return np.frombuffer(image, np.uint8)  # a view: one object may be named a million times
    raise VerificationSetError(
        f"{path}: image {index} is {_kind(image)}; allowed are the bytes of an image file and "
        "uint8 arrays [height, width, 3]"
    )


def _kind(value: Any) -> str:
    """What a value of a hostile file is, in a few words, without printing its content."""
    if isinstance(value, PickledArray):
        value = value.array
    if isinstance(value, np.ndarray):
        return f"an array {list(value.shape)} of {value.dtype}"
    if isinstance(value, int):
        return f"the integer {value}" if -(10**6) < value < 10**6 else "a large integer"
    length = f" of length {len(value)}" if hasattr(value, "__len__") else ""
    return f"a {type(value).__name__}{length}"


# --------------------------------------------------------------------------------------------
# Embedding on all ranks together
# --------------------------------------------------------------------------------------------


def share_of_batches(
    num_images: int, batch_size: int, rank: int, world_size: int
) -> tuple[int, int]:
    """Images [start, end) of `rank`: whole batches, contiguous, at most one batch apart.

    Cutting between batches only means that every image sits in the same batch whatever the
    number of ranks, so a network gives it the same embedding to the bit.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank is {rank}; with world_size {world_size} it is in [0, {world_size})")
    num_batches = -(-num_images // batch_size)
    start = num_batches * rank // world_size * batch_size
    end = num_batches * (rank + 1) // world_size * batch_size
    return min(start, num_images), min(end, num_images)


def verify(
    embed: Embed,
    sets: Sequence[VerificationSet],
    *,
    rank: int = 0,
    world_size: int = 1,
    group: dist.ProcessGroup | None = None,
    batch_size: int = 64,
    input_size: int = 112,
) -> dict[str, VerificationResult]:
    """Score `embed` on every set; all ranks of `group` call it together and get the same answer.

    Args:
        embed: uint8 RGB [n, 3, H, W] on the CPU -> [n, D], float32 or float64, on any device.
            Every rank must have the same weights. Called with the images and, separately, with
            their mirror images, `batch_size` at a time (the last batch of a set may be smaller).
        sets: the same sets on every rank.
        rank, world_size, group: which share is this one's; torch.distributed is used only when
            `world_size` is more than 1.
        input_size: height and width in pixels every image must have.

    Returns:
        {set name: metrics}, the metrics being those of `eval.metrics.verification_metrics`.
        Embeddings that are collapsed or not finite give NaN and one logged warning.

    Raises:
        ValueError: bad arguments, two sets of one name, an image of another size, an embedding of
            another shape. What fails on one rank raises there, and a RuntimeError that names the
            rank on the others: no rank is left waiting.
    """
    if len({one.name for one in sets}) != len(sets):
        raise ValueError(f"two sets share a name: {', '.join(one.name for one in sets)}")
    results = {}
    for one in sets:
        plain, flipped = embed_set(
            embed,
            one,
            rank=rank,
            world_size=world_size,
            group=group,
            batch_size=batch_size,
            input_size=input_size,
        )
        results[one.name] = score_set(one, plain, flipped, warn=rank == 0)
    return results


def score_set(
    one: VerificationSet,
    plain: NDArray[np.floating],
    flipped: NDArray[np.floating],
    warn: bool = True,
) -> VerificationResult:
    """`eval.metrics.verification_metrics` of a set; what is NaN is named in one logged warning."""
    result = verification_metrics(plain, flipped, one.issame)
    undefined = [key for key, value in result.items() if math.isnan(value)]
    if undefined and warn:
        logger.warning(
            "verification on %s: %s undefined (NaN): the embeddings are collapsed or not finite, "
            "or the set has one kind of pair only",
            one.name,
            ", ".join(undefined),
        )
    return result


def embed_set(
    embed: Embed,
    one: VerificationSet,
    *,
    rank: int = 0,
    world_size: int = 1,
    group: dist.ProcessGroup | None = None,
    batch_size: int = 64,
    input_size: int = 112,
) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
    """(embeddings, embeddings of the mirror images), each [2N, D], whole on every rank.

    Arguments and errors as for `verify`.
    """
    start, end = share_of_batches(len(one.images), batch_size, rank, world_size)
    local: Tensor | None = None
    failure: Exception | None = None
    try:
        local = _embed_share(embed, one, start, end, batch_size, input_size)  # [end - start, 2D]
    except Exception as error:
        if world_size == 1:
            raise
        failure = error  # the other ranks must hear of it before it is raised
    if world_size > 1:
        counts = [
            other_end - other_start
            for other_start, other_end in (
                share_of_batches(len(one.images), batch_size, other, world_size)
                for other in range(world_size)
            )
        ]
        local = _gather_rows(local, failure, counts, one.name, world_size, group)
    assert local is not None  # a set is never empty
    rows = local.numpy()
    width = rows.shape[1] // 2
    return rows[:, :width], rows[:, width:]


def _embed_share(
    embed: Embed, one: VerificationSet, start: int, end: int, batch_size: int, input_size: int
) -> Tensor | None:
    """Plain and mirrored embeddings side by side [end - start, 2D] on the CPU; None if no image."""
    rows = []
    for batch in _decoded_batches(one, start, end, batch_size, input_size):
        both = []
        for images in (batch, batch.flip(3)):
            embeddings = embed(images)
            if embeddings.ndim != 2 or len(embeddings) != len(batch) or not embeddings.shape[1]:
                raise ValueError(
                    f"embed gave shape {list(embeddings.shape)} for {len(batch)} images; "
                    f"[{len(batch)}, D] is what is needed"
                )
            wide = embeddings.dtype == torch.float64
            both.append(embeddings.detach().to("cpu", torch.float64 if wide else torch.float32))
        rows.append(torch.cat(both, dim=1))
    return torch.cat(rows) if rows else None


def _decoded_batches(
    one: VerificationSet, start: int, end: int, batch_size: int, input_size: int
) -> Iterator[Tensor]:
    """uint8 [n, 3, H, W], a batch at a time, the next one being decoded meanwhile."""

    def decode(index: int) -> NDArray[np.uint8]:
        image = one.images[index]
        where = f"verification set {one.name}, image {index}"
        if isinstance(image, bytes) or image.ndim == 1:
            pixels = decode_image(bytes(image), where)
        else:
            pixels = image
        if pixels.shape != (input_size, input_size, 3):
            raise ValueError(
                f"{where}: shape is {list(pixels.shape)}; the model takes "
                f"[{input_size}, {input_size}, 3]. Pack the set again at that size"
            )
        return pixels

    def submit(first: int) -> list[Future[NDArray[np.uint8]]]:
        return [pool.submit(decode, i) for i in range(first, min(first + batch_size, end))]

    with ThreadPoolExecutor(max_workers=4) as pool:
        upcoming = submit(start)
        for first in range(start, end, batch_size):
            current, upcoming = upcoming, submit(first + batch_size)
            pixels = np.stack([future.result() for future in current])  # [n, H, W, 3]
            yield torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())


def _gather_rows(
    local: Tensor | None,
    failure: Exception | None,
    counts: list[int],
    set_name: str,
    world_size: int,
    group: dist.ProcessGroup | None,
) -> Tensor:
    """All ranks' rows in rank order, on the CPU; or an error on every rank if one has failed.

    Two collectives: what everybody has (failed, width, float64), then the rows, padded to the
    largest share because shares differ.
    """
    device = torch.device("cpu")
    if "nccl" in dist.get_backend(group):
        device = torch.device("cuda", torch.cuda.current_device())
    width = 0 if local is None else local.shape[1]
    wide = local is not None and local.dtype == torch.float64
    status = torch.tensor([failure is not None, width, wide], dtype=torch.int64, device=device)
    gathered = [torch.empty_like(status) for _ in range(world_size)]
    dist.all_gather(gathered, status, group=group)
    everyone = torch.stack(gathered).cpu()  # [world_size, 3]

    if failure is not None:
        raise failure
    failed = everyone[:, 0].nonzero().flatten().tolist()
    if failed:
        raise RuntimeError(
            f"verification on {set_name} failed on rank {', '.join(map(str, failed))}; "
            "the error raised there says why"
        )
    widths = set(everyone[:, 1].tolist()) - {0}
    if len(widths) > 1:
        raise RuntimeError(f"ranks gave embeddings of different widths: {sorted(widths)}")

    dtype = torch.float64 if everyone[:, 2].any() else torch.float32
    padded = torch.zeros(max(counts), widths.pop(), dtype=dtype, device=device)
    if local is not None:
        padded[: len(local)] = local
    parts = [torch.empty_like(padded) for _ in range(world_size)]
    dist.all_gather(parts, padded, group=group)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)]).cpu()


# --------------------------------------------------------------------------------------------
# The command
# --------------------------------------------------------------------------------------------


def format_results(results: dict[str, VerificationResult]) -> str:
    """A table of `verify`'s answer, one line per set."""
    lines = [f"{'set':<16}{'pairs':>7}{'accuracy':>19}{'flip':>19}{'TAR@FAR1e-3':>13}{'AUC':>9}"]
    for name, values in results.items():
        plain = f"{values['accuracy']:.5f} ± {values['accuracy_std']:.5f}"
        flip = f"{values['accuracy_flip']:.5f} ± {values['accuracy_flip_std']:.5f}"
        lines.append(
            f"{name:<16}{values['num_pairs']:>7.0f}{plain:>19}{flip:>19}"
            f"{values['tar_at_far_1e-3']:>13.5f}{values['auc']:>9.5f}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code (2: wrong input, as argparse has it)."""
    parser = argparse.ArgumentParser(
        prog="python -m eval.verification", description="Verify a model on LFW-style .bin sets."
    )
    parser.add_argument("--model", required=True, help="folder of a run, or its model.pt")
    parser.add_argument(
        "--data", required=True, nargs="+", help=".bin files, or folders (every .bin in them)"
    )
    parser.add_argument("--network", help="architecture, for a model.pt that does not say")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--device", help="default: cuda if there is one, else cpu")
    parser.add_argument("--json", type=Path, help="write the metrics there (NaN as null)")
    parser.add_argument("--plot", type=Path, help="write the ROC curves there (.png, .pdf, .svg)")
    options = parser.parse_args(arguments)
    try:
        _check_outputs(options.json, options.plot)
        results, curves = _evaluate(options)
        print(format_results(results))
        if options.json:
            _write_json(results, options.json)
        if options.plot:
            from eval.plots import plot_roc  # matplotlib takes a second to import

            plot_roc(curves, options.plot, "Verification ROC, flip embeddings")
    except (OSError, ValueError, WeightsError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _check_outputs(json_file: Path | None, plot_file: Path | None) -> None:
    """Make their folders and see that both can be written, before the work they are to hold."""
    if plot_file and plot_file.suffix not in _PLOT_SUFFIXES:
        raise ValueError(f"--plot {plot_file}: the name must end in {', '.join(_PLOT_SUFFIXES)}")
    for option, file in (("--json", json_file), ("--plot", plot_file)):
        if file is None:
            continue
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.is_dir():
            raise ValueError(f"{option} {file} is a folder; give the name of a file to write")
        if not os.access(file if file.exists() else file.parent, os.W_OK):
            raise ValueError(f"{option} {file} is not writable; give another name, or allow it")


def _choose_device(name: str | None) -> torch.device:
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError) as error:  # AssertionError: a PyTorch without CUDA
        usable = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
        raise ValueError(
            f"--device {name}: PyTorch cannot use such a device here; give one of "
            f"{', '.join(usable)}, or leave it out"
        ) from error
    return torch.device(name)


def _write_json(results: dict[str, VerificationResult], path: Path) -> None:
    """Whole or not at all; NaN, which JSON does not have, as null."""
    plain = {
        name: {key: None if math.isnan(value) else value for key, value in values.items()}
        for name, values in results.items()
    }
    unfinished = path.with_name(path.name + ".part")
    try:
        unfinished.write_text(json.dumps(plain, indent=2) + "\n")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)  # gone already unless something failed


def _evaluate(
    options: argparse.Namespace,
) -> tuple[dict[str, VerificationResult], dict[str, tuple[NDArray, NDArray]]]:
    """(metrics, (FAR, TAR) curve) of every set the options name."""
    device = _choose_device(options.device)
    paths = [path for given in options.data for path in _bin_files(Path(given))]
    backbone, metadata = load_model(options.model, network=options.network)
    if metadata.color != "RGB" or metadata.in_channels != 3:
        raise ValueError(
            f"{options.model} takes {metadata.in_channels} {metadata.color} channels; "
            "only RGB models can be verified here"
        )
    embed = Embedder(backbone.to(device), metadata.mean, metadata.std)
    results, curves = {}, {}
    for path in paths:
        one = load_verification_set(path)
        if one.name in results:
            raise VerificationSetError(f"{path}: a set named {one.name} was already given")
        plain, flipped = embed_set(
            embed, one, batch_size=options.batch_size, input_size=metadata.input_size
        )
        results[one.name] = score_set(one, plain, flipped)
        scores = -pair_distances(plain.astype(np.float64) + flipped)
        if math.isnan(results[one.name]["auc"]):  # a curve of rounding errors is no curve
            scores[:] = np.nan
        far, tar, _ = roc_curve(scores, one.issame)
        curves[one.name] = (far, tar)
    return results, curves


def _bin_files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]  # whether it is there is checked when it is read
    found = sorted(path.glob("*.bin"))
    if not found:
        raise VerificationSetError(f"{path}: no .bin set in this folder")
    return found


if __name__ == "__main__":
    sys.exit(main())
