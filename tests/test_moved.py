"""Imports that the documentation of 0.1 showed work for one release and name the new place."""

from __future__ import annotations

import importlib
import warnings

import pytest

from arcshard import ArcFace, Margin, PartialFC, SGDRows, parallel

# module and name as shown before -> module and name now
SHOWN = {
    ("head.row_update", "SGDRows"): ("arcshard.head.row_optimizer", "SGDRows"),
    ("head.row_update", "AdamWRows"): ("arcshard.head.row_optimizer", "AdamWRows"),
    ("head.row_update", "RowUpdate"): ("arcshard.head.row_optimizer", "RowOptimizer"),
    ("head.shard", "class_range"): ("arcshard.shard", "class_range"),
    ("margins.base", "Margin"): ("arcshard.margins.base", "Margin"),
    ("parallel", "ParallelCrossEntropyLoss"): ("arcshard.parallel", "ParallelCrossEntropyLoss"),
    ("parallel", "ParallelLinear"): ("arcshard.parallel", "ParallelLinear"),
    ("parallel", "Split"): ("arcshard.parallel", "Split"),
    ("parallel", "clip_grad_norm_"): ("arcshard.parallel", "clip_grad_norm_"),
    ("parallel", "copy"): ("arcshard.parallel", "copy"),
    ("parallel", "gather"): ("arcshard.parallel", "gather"),
    ("parallel", "init_process_group"): ("arcshard.parallel", "init_process_group"),
    ("parallel", "mark_split"): ("arcshard.parallel", "mark_split"),
    ("parallel", "reduce"): ("arcshard.parallel", "reduce"),
    ("parallel", "register_parallel_dim"): ("arcshard.parallel", "register_parallel_dim"),
    ("parallel", "split_of"): ("arcshard.parallel", "split_of"),
    ("parallel.split", "fill_split"): ("arcshard.parallel.split", "fill_split"),
    ("parallel.groups", "resolve_group"): ("arcshard.parallel.groups", "resolve_group"),
    ("eval.embedder", "Embedder"): ("eval.model", "Embedder"),
    ("eval.embedder", "open_model"): ("eval.model", "open_model"),
    ("dataset", "normalise"): ("data.augment", "normalize_images"),
}


@pytest.mark.parametrize("shown", SHOWN, ids=".".join)
def test_an_import_shown_before_works_and_warns_of_the_new_path(shown: tuple[str, str]) -> None:
    (module, name), (new_module, new_name) = shown, SHOWN[shown]
    found: dict[str, object] = {}
    with pytest.warns(DeprecationWarning, match=new_name) as caught:
        exec(f"from {module} import {name}", found)
    assert found[name] is getattr(importlib.import_module(new_module), new_name)
    message = str(caught[0].message)
    assert f"from {new_module} import {new_name}" in message
    assert caught[0].filename == "<string>"  # the importer, not the module that moved


@pytest.mark.parametrize("module", ["head.row_update", "parallel", "dataset", "eval.embedder"])
def test_a_name_that_never_was_there_is_an_attribute_error(module: str) -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        getattr(importlib.import_module(module), "no_such_name")  # noqa: B009 - not an attribute


def test_a_star_import_of_an_old_module_brings_its_names() -> None:
    found: dict[str, object] = {}
    with pytest.warns(DeprecationWarning, match="arcshard.parallel"):
        exec("from parallel import *", found)
    assert set(parallel.__all__) <= found.keys()


def test_a_margin_with_the_first_spelling_of_normalize_is_refused() -> None:
    with pytest.raises(TypeError, match=r"Plain\.normalise is called normalize now"):
        type("Plain", (Margin,), {"normalise": False})
    with pytest.raises(TypeError, match=r"Plain\.normalise is called normalize now"):
        type("Plain", (Margin,), {"__annotations__": {"normalise": bool}})


def test_arguments_of_partial_fc_that_were_shown_before_work_and_warn() -> None:
    # Type checkers know the present names only, as they should: hence the ignores.
    with pytest.warns(DeprecationWarning, match="row_update is called row_optimizer") as caught:
        head = PartialFC(ArcFace(), 4, 9, row_update=SGDRows())  # type: ignore[call-arg]
    assert isinstance(head.row_optimizer, SGDRows)
    assert caught[0].filename == __file__
    old = {"centres_per_class": 2, "centre_device": "cpu"}
    with pytest.warns(DeprecationWarning, match="centers_per_class now|center_device now"):
        head = PartialFC(ArcFace(), 4, 9, 0.5, row_optimizer=SGDRows(), **old)  # type: ignore[arg-type]
    assert head.centers_per_class == 2
    with pytest.raises(TypeError, match="one argument: leave row_update out"):
        PartialFC(ArcFace(), 4, 9, row_update=SGDRows(), row_optimizer=SGDRows())  # type: ignore[call-arg]


def test_the_two_files_at_the_top_stay_without_a_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exec("from partial_fc import PartialFC\nfrom losses import ArcFace", {})
