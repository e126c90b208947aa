"""Small ONNX files and model.pt for tests of evaluation: real files, computed in microseconds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def write_pooling_model(
    path: Path,
    *,
    size: int = 112,
    cells: int = 7,
    width: int = 24,
    batch: int | str = "batch",
    layout: str = "NCHW",
    metadata: dict[str, str] | None = None,
    two_outputs: bool = False,
    seed: int = 0,
) -> Path:
    """An ONNX file: average pooling to cells x cells, then a random matrix to `width` numbers."""
    random = np.random.default_rng(seed)
    matrix = random.standard_normal((3 * cells * cells, width)).astype(np.float32)
    shape = [batch, 3, size, size] if layout == "NCHW" else [batch, size, size, 3]
    nodes = []
    source = "data"
    if layout == "NHWC":
        nodes.append(helper.make_node("Transpose", ["data"], ["first"], perm=[0, 3, 1, 2]))
        source = "first"
    step = size // cells
    nodes += [
        helper.make_node(
            "AveragePool", [source], ["pooled"], kernel_shape=[step, step], strides=[step, step]
        ),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        helper.make_node("MatMul", ["flat", "matrix"], ["embedding"]),
    ]
    outputs = [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, [batch, width])]
    if two_outputs:
        flat = helper.make_tensor_value_info("flat", TensorProto.FLOAT, [batch, len(matrix)])
        outputs.insert(0, flat)
    graph = helper.make_graph(
        nodes,
        "pooling",
        [helper.make_tensor_value_info("data", TensorProto.FLOAT, shape)],
        outputs,
        [numpy_helper.from_array(matrix, "matrix")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    if metadata:
        helper.set_model_props(model, metadata)
    onnx.save(model, path)
    return path


OURS = {"mean": "127.5", "std": "127.5", "color": "RGB", "input_size": "112"}
"""Metadata that says all of preprocessing."""
