"""`make gpu-wheels` collects whatever a usual PyTorch image lacks of what ArcShard requires."""

from __future__ import annotations

import importlib.metadata
import re

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.helpers import ROOT

IN_THE_IMAGE = {
    "torch",
    "numpy",
    "opencv-python-headless",
    "tqdm",
    "tensorboard",
    "matplotlib",
    "onnx",
    "onnxscript",
    "onnxruntime",
}


def test_the_wheels_and_the_image_have_all_that_is_required() -> None:
    listed = re.search(r"^GPU_LACKS := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert listed is not None
    wheels = {canonicalize_name(name) for name in listed[1].split()}
    lines = (ROOT / "requirement.txt").read_text().splitlines()
    wanted = [Requirement(word) for line in lines if (word := line.split("#")[0].strip())]
    for wheel in wheels:
        wanted += map(Requirement, importlib.metadata.requires(wheel) or [])
    needed = {
        canonicalize_name(one.name)
        for one in wanted
        if one.marker is None or one.marker.evaluate({"extra": ""})
    }
    assert needed - IN_THE_IMAGE <= wheels
    assert wheels <= needed  # and nothing else
    pins = {line.split("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines()}
    assert wheels <= {canonicalize_name(pin) for pin in pins}
