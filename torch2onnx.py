"""Export trained weights to an ONNX file that has been compared with PyTorch.

    python torch2onnx.py work_dirs/ms1mv3_r50
    python torch2onnx.py model.pt --network r50 --output face.onnx --simplify
    python torch2onnx.py work_dirs/ms1mv3_r50 --precision fp16 --verify DATA/lfw.bin

The file appears only if its outputs agree with those of PyTorch; docs/export.md has the details.
Weights beyond 2 GiB are in a second file beside it. Exit codes: 0, the file is written; 1, the ONNX
model disagrees or is not valid; 2, the input cannot be exported.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from onnx.shape_inference import InferenceError

from backbones import Backbone, model_names
from backbones.weights import ModelMetadata, load_model
from eval.model import Embedder, open_model
from eval.verification import verify
from eval.verification_sets import VerificationSet, load_verification_set
from utils.cli import cli_command
from utils.errors import UserError

INPUT_NAME, OUTPUT_NAME = "data", "embedding"
LOWEST_OPSET = DEFAULT_OPSET = 18  # the lowest that torch writes, and the most widely supported
CHECKED_BATCHES = (1, 3, 32)
TOLERANCE = 1e-4  # relative to the largest output
HALF_TOLERANCE = 0.05  # the same for fp16, whose steps are 1e-3 and add up through the layers
# Bytes of weights that fit into the .onnx: protobuf ends at 2 GiB, and the graph needs some of it.
LARGEST_SINGLE_FILE = 2 * 1024**3 - 16 * 1024**2


class ParityError(RuntimeError):
    """The ONNX model does not compute what the PyTorch model computes. No file is left."""


@dataclass(frozen=True)
class ExportReport:
    """What `export_onnx` wrote.

    Attributes:
        files: The .onnx file, and the .data file with its weights where they do not fit into it.
        size_bytes: Size of all files together.
        opset: Version of the default ONNX domain.
        nodes: Operators in the graph.
        differences: Batch size -> largest |ONNX - PyTorch| over the largest |PyTorch|.
        accuracies: Name of a verification set -> accuracy_flip of PyTorch, and that of the file
            through onnxruntime. Empty unless sets were given.
    """

    files: tuple[Path, ...]
    size_bytes: int
    opset: int
    nodes: int
    differences: dict[int, float]
    accuracies: dict[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def max_relative_difference(self) -> float:
        """The largest difference over all checked batches."""
        return max(self.differences.values())


def export_onnx(
    backbone: Backbone,
    metadata: ModelMetadata,
    output: str | os.PathLike[str],
    *,
    opset: int = DEFAULT_OPSET,
    simplify: bool = False,
    precision: str = "fp32",
    fold_normalization: bool = False,
    verify_on: Sequence[VerificationSet] = (),
) -> ExportReport:
    """Write `backbone` in eval mode as an ONNX file, once it agrees with PyTorch.

    The input is `data` [batch, in_channels, input_size, input_size] float32, the output is
    `embedding` [batch, num_features] float32, not normalized; batch is symbolic. The backbone
    itself, its mode and its device do not change. Weights that do not fit into a file of 2 GiB go
    to `<output>.data` beside it. No file appears under its name before all checks have passed.

    Args:
        backbone: The network; any kind.
        metadata: What the file says about the network. Its sizes must be those of the backbone.
        output: The file to write. Its folder is created if it does not exist.
        opset: Version of the default ONNX domain, 18 or more.
        simplify: Whether to fold constants and fuse norms into convolutions first.
        precision: "fp32", or "fp16" for weights and arithmetic of half the size; input and output
            remain float32.
        fold_normalization: Whether to put (pixel - mean) / std into the graph, which then takes
            pixels 0..255. The metadata in the file then says mean 0 and std 1.
        verify_on: Sets whose accuracy is measured with PyTorch and with the file. In fp32 the two
            may differ by one pair.

    Returns:
        The files, their sizes, and the measured differences.

    Raises:
        UserError: A size, the opset or the weights do not allow the export.
        ParityError: The ONNX model does not load, or disagrees with PyTorch on a batch of 1, 3 or
            32 images or on one of `verify_on`.
        onnx.checker.ValidationError: The ONNX model is not valid.
        onnx.shape_inference.InferenceError: The shapes in the ONNX model contradict each other.
    """
    output = Path(output)
    _check_request(backbone, metadata, opset, output, precision)
    backbone = copy.deepcopy(backbone).to("cpu", torch.float32).eval()
    width = 2 if precision == "fp16" else 4
    weight_bytes = sum(width * tensor.numel() for tensor in backbone.state_dict().values())
    exported = _Exported(backbone, metadata, precision, fold_normalization)
    said = replace(metadata, mean=0.0, std=1.0) if fold_normalization else metadata
    data, outside = output.with_name(f"{output.name}.data"), weight_bytes > LARGEST_SINGLE_FILE

    output.parent.mkdir(parents=True, exist_ok=True)
    # In a temporary folder, because the model refers to its file of weights by its final name.
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as folder:
        unchecked = Path(folder) / output.name
        model = _translate(exported, opset, simplify)
        _name_normalization(model, fold_normalization)
        _describe(model, said, precision)
        for tensor in model.graph.initializer:
            if outside and len(tensor.raw_data) > 1024:  # shapes, which are small, stay inside
                onnx.external_data_helper.set_external_data(tensor, data.name)
        onnx.save_model(model, unchecked, format="protobuf")
        onnx.checker.check_model(str(unchecked), full_check=True)
        differences = _compare(backbone, metadata, unchecked, precision, fold_normalization)
        accuracies = {
            one.name: _verify(backbone, metadata, unchecked, one, precision) for one in verify_on
        }
        if outside:
            output.unlink(missing_ok=True)  # a kill here must not leave old graph and new weights
            unchecked_data = unchecked.with_name(data.name)
            unchecked_data.chmod(unchecked.stat().st_mode)  # onnx lets only the owner read it
            os.replace(unchecked_data, data)
        os.replace(unchecked, output)
        if not outside:
            data.unlink(missing_ok=True)  # it belonged to the file just replaced
    files = (output, data) if outside else (output,)
    return ExportReport(
        files=files,
        size_bytes=sum(file.stat().st_size for file in files),
        opset=opset,
        nodes=len(model.graph.node),
        differences=differences,
        accuracies=accuracies,
    )


class _Exported(torch.nn.Module):
    """The exported module: the backbone with normalization before it and casts around it."""

    def __init__(
        self, backbone: Backbone, metadata: ModelMetadata, precision: str, fold: bool
    ) -> None:
        super().__init__()
        self.is_half = precision == "fp16"
        self.backbone = copy.deepcopy(backbone).half() if self.is_half else backbone
        self.shape = (backbone.in_channels, backbone.input_size, backbone.input_size)
        # These names differ from those of operators: an exported mean would be called "mean" too.
        self.fold, self.pixel_mean = fold, _by_channel(metadata.mean)
        self.pixel_scale = 1 / _by_channel(metadata.std)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if self.fold:
            images = (images - self.pixel_mean) * self.pixel_scale
        if not self.is_half:
            return self.backbone(images)
        return self.backbone(images.half()).float()


def _by_channel(value: float | tuple[float, ...]) -> float | torch.Tensor:
    """Return a number as it is, and one number per channel as a tensor [channels, 1, 1]."""
    return torch.tensor(value).view(-1, 1, 1) if isinstance(value, tuple) else float(value)


def _check_request(
    backbone: Backbone, metadata: ModelMetadata, opset: int, output: Path, precision: str
) -> None:
    if precision not in ("fp32", "fp16"):
        raise UserError(f"precision is {precision!r}; allowed are fp32 and fp16")
    highest = onnx.defs.onnx_opset_version()
    if not LOWEST_OPSET <= opset <= highest:
        raise UserError(f"opset {opset} is not possible: {LOWEST_OPSET} to {highest} are")
    for name in ("num_features", "input_size", "in_channels"):
        said, has = getattr(metadata, name), getattr(backbone, name)
        if said != has:
            raise UserError(
                f"the metadata says {name}={said}, the backbone has {has}: make them agree"
            )
    if output.is_dir():
        raise UserError(f"{output} is a folder: give the name of a file to write")


def _translate(exported: _Exported, opset: int, simplify: bool) -> onnx.ModelProto:
    """Translate the module to ONNX with a symbolic batch, which is not relabeled afterwards."""
    # Two images, because torch.export takes a size of 1 for a constant.
    example = torch.zeros(2, *exported.shape)
    with _quiet():
        program = torch.onnx.export(
            exported.eval(),
            (example,),
            input_names=[INPUT_NAME],
            output_names=[OUTPUT_NAME],
            opset_version=opset,
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            external_data=False,
            optimize=simplify,
            verbose=False,
        )
    assert program is not None  # it is None only for the old exporter
    model = program.model_proto
    for tensor in model.graph.initializer:  # weights keep their names of the state dict
        tensor.name = tensor.name.removeprefix("backbone.")
    for node in model.graph.node:
        node.input[:] = [name.removeprefix("backbone.") for name in node.input]
    written = next(entry.version for entry in model.opset_import if not entry.domain)
    if written != opset:
        raise UserError(
            f"opset {opset} was asked for, but torch {torch.__version__} wrote {written}: "
            f"use --opset {written}"
        )
    return model


def _name_normalization(model: onnx.ModelProto, folded: bool) -> None:
    """Put the folded nodes first and name them Sub and Mul: MFR's checker looks for such names."""
    if not folded:
        return
    graph, first, at = model.graph, [], INPUT_NAME
    maker = {node.output[0]: node for node in graph.node}
    for kind in ("Sub", "Mul"):
        step = next(n for n in graph.node if n.op_type == kind and at in n.input)
        step.name, at = f"{kind}_normalise", step.output[0]  # as in every file written so far
        first += [maker[name] for name in step.input if name in maker and maker[name] not in first]
        first.append(step)
    rest = [node for node in graph.node if node not in first]
    ordered = [onnx.NodeProto.FromString(node.SerializeToString()) for node in (*first, *rest)]
    graph.ClearField("node")
    graph.node.extend(ordered)


def _describe(model: onnx.ModelProto, metadata: ModelMetadata, precision: str) -> None:
    """Add our metadata, and remove the exporter's notes, which hold paths of this machine."""
    graph = model.graph
    for part in (*graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    graph.ClearField("metadata_props")
    model.ClearField("metadata_props")
    facts = asdict(metadata)
    facts["embedding_size"] = facts.pop("num_features")
    facts["options"] = json.dumps(facts["options"]) if facts["options"] else None
    if precision != "fp32":
        facts["precision"] = precision
    facts["exported_with"] = f"torch {torch.__version__}, onnx {onnx.__version__}"
    onnx.helper.set_model_props(
        model, {key: str(value) for key, value in facts.items() if value is not None}
    )


def _compare(
    backbone: Backbone, metadata: ModelMetadata, path: Path, precision: str, folded: bool
) -> dict[int, float]:
    """Compare the file in onnxruntime with the backbone.

    Returns:
        Batch size -> relative difference.

    Raises:
        ParityError: A difference is above the tolerance or not a number, or the file does not load.
    """
    tolerance = TOLERANCE if precision == "fp32" else HALF_TOLERANCE
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions share no base class
        raise ParityError(
            f"onnxruntime {onnxruntime.__version__} does not load the ONNX model ({error}). "
            f"Try --opset {LOWEST_OPSET}, the safest"
        ) from error
    random = np.random.default_rng(0)
    shape = (backbone.in_channels, backbone.input_size, backbone.input_size)
    differences = {}
    for batch in CHECKED_BATCHES:
        images = random.uniform(-1, 1, (batch, *shape)).astype(np.float32)
        with torch.no_grad():
            expected = backbone(torch.from_numpy(images)).numpy()
        if not np.isfinite(expected).all():
            raise ParityError(
                "in PyTorch itself embeddings are not finite: the weights are broken or untrained"
            )
        mean, std = (
            np.asarray(v, np.float32).reshape(-1, 1, 1) for v in (metadata.mean, metadata.std)
        )
        given = images * std + mean if folded else images
        found = np.asarray(session.run([OUTPUT_NAME], {INPUT_NAME: given})[0])
        if found.shape != expected.shape:
            raise ParityError(
                f"for {batch} images the ONNX model gives {found.shape}, PyTorch {expected.shape}"
            )
        difference = float(np.abs(found - expected).max() / np.abs(expected).max())
        if not difference <= tolerance:  # also catches NaN
            way_out = "try another --opset, or without --simplify"
            if precision == "fp16":
                way_out = "this network does not bear fp16; export it in fp32"
            raise ParityError(
                f"for {batch} images the ONNX model differs from PyTorch by {difference:.1e} of "
                f"the largest output, more than {tolerance:.0e}: {way_out}"
            )
        differences[batch] = difference
    return differences


def _verify(
    backbone: Backbone, metadata: ModelMetadata, path: Path, one: VerificationSet, precision: str
) -> tuple[float, float]:
    """Measure accuracy_flip on a set with PyTorch, and with the file as any user of it would.

    Returns:
        The accuracy of PyTorch and that of the file.

    Raises:
        ParityError: The two differ by more than a pair in fp32, or that of the file is not a
            number.
    """
    ours = Embedder(backbone, metadata.mean, metadata.std, color=metadata.color)
    size = metadata.input_size
    expected = verify(ours, [one], input_size=size)[one.name]["accuracy_flip"]
    found = verify(open_model(path).embed, [one], input_size=size)[one.name]["accuracy_flip"]
    # Rounding may carry one pair across a threshold of the grid; more pairs mean another network.
    allowed = 1.5 / one.num_pairs if precision == "fp32" else 1.0
    if not abs(expected - found) <= allowed:
        raise ParityError(
            f"on {one.name} the ONNX model has accuracy {found:.5f}, PyTorch {expected:.5f}"
        )
    return expected, found


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the exporter's remarks about missing packages and about its own deprecated calls."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        logging.disable(before)


@cli_command()
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code; 1 if the file is not as good as the model."""
    args = _parser().parse_args(_present_options(sys.argv[1:] if argv is None else argv))
    output = args.output or _default_output(args.model)
    try:
        backbone, metadata = load_model(args.model, network=args.network)
        print(
            f"{args.model}: {metadata.network}, {metadata.in_channels} x {metadata.input_size} x "
            f"{metadata.input_size} -> {metadata.num_features}"
        )
        report = export_onnx(
            backbone,
            metadata,
            output,
            opset=args.opset,
            simplify=args.simplify,
            precision=args.precision,
            fold_normalization=args.fold_normalization,
            verify_on=[
                load_verification_set(path, None, metadata.input_size) for path in args.verify
            ],
        )
    except (ParityError, onnx.checker.ValidationError, InferenceError) as error:
        print(f"error: {error}\nNo file was written.", file=sys.stderr)
        return 1
    print(
        f"{' and '.join(map(str, report.files))}: {report.size_bytes / 1024**2:.1f} MiB, "
        f"opset {report.opset}, {report.nodes} nodes{', simplified' if args.simplify else ''}\n"
        f"agrees with PyTorch on batches of {', '.join(map(str, report.differences))}: largest "
        f"relative difference {report.max_relative_difference:.1e}"
    )
    for name, (before, after) in report.accuracies.items():
        print(
            f"{name}: accuracy {before:.5f} with PyTorch in fp32, {after:.5f} with the file in "
            f"{args.precision}"
        )
    return 0


def _present_options(arguments: Sequence[str]) -> list[str]:
    """Replaces the first spelling of an option, which is not an option of its own.

    As one it would make abbreviations such as `--fold` ambiguous.
    """
    present = {"--fold-normalisation": "--fold-normalization"}
    return [present.get(word, word) for word in arguments]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="torch2onnx.py", description="Export a trained backbone to a checked ONNX file."
    )
    add = parser.add_argument
    add("model", type=Path, help="the output folder of a run, or a file of weights")
    add("--output", type=Path, help="file to write (default: model.onnx beside the weights)")
    add("--network", help=f"for weights that do not say it themselves: {', '.join(model_names())}")
    add("--opset", type=int, default=DEFAULT_OPSET, help="ONNX opset (default: %(default)s)")
    add("--simplify", action="store_true", help="fold constants, fuse norms into convolutions")
    add("--precision", choices=("fp32", "fp16"), default="fp32", help="of weights and arithmetic")
    add("--fold-normalization", action="store_true", help="the graph takes pixels 0..255")
    add("--verify", nargs="+", type=Path, default=[], metavar="SET", help=".bin sets to compare on")
    return parser


def _default_output(model: Path) -> Path:
    if model.is_dir():
        return model / "model.onnx"
    while model.suffix in (".tar", ".pth", ".pt"):
        model = model.with_suffix("")
    return model.with_name(f"{model.name}.onnx")


if __name__ == "__main__":
    sys.exit(main())
