"""Public names are the field's: private words that were replaced do not come back; US spelling."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from configs.base import Config
from tests.helpers import ENTRY_POINTS, PACKAGES, ROOT

# What was replaced, and by what: modules, classes, functions and methods, config keys.
MODULES = {
    "keeper": "checkpoint_manager",
    "agreement": "checkpoint_manager",
    "journal": "metrics_logger",
    "watch": "divergence",
    "footprint": "planner/memory",
    "stopwatch": "planner/measure",
    "published": "checkpoint/arcface_torch",
    "saved_head": "checkpoint/class_centers",
    "readable": "reference",
    "row_update": "row_optimizer",
    "host_centers": "offload",
    "work_buffer": "workspace",
    "chunk": "block",
    "initial": "init",
    "plain_optimizer": "row_optimizer",
    "findings": "report",
    "examine": "validate",
    "mend": "repair",
    "salvage": "scan",
    "sets": "concat",
    "batches": "collate",
    "command": "cli",
    "embedder": "model",
    "embedding": "extract",
    "onnx_embedder": "onnx_model",
}
CLASSES = {
    "Pass": "SoftmaxContext",
    "Engine": "FusedMarginSoftmax",
    "Update": "CenterUpdate",
    "Sides": "DistillationInputs",
    "LentCenters": "OffloadedCenters",
    "HostCenters": "CenterOffload",
    "BatchRules": "BatchGatherer",
    "Target": "PositiveLogits",
    "Parts": "TrainComponents",
    "Votes": "RunFlags",
    "Agreement": "Flags",
    "Watch": "DivergenceMonitor",
    "WatchReport": "StepStats",
    "Found": "Checkpoint",
    "Ranks": "RankGroup",
    "Stored": "TensorShard",
    "Needs": "Requirements",
    "Footprint": "MemoryEstimate",
    "Ledger": "MemoryTracker",
    "Position": "RankStatus",
    "Lost": "Stragglers",
    "Loaded": "LoadedBatch",
    "BatchMaker": "BatchLoader",
    "InOrder": "SequentialSampler",
    "Shuffled": "RandomSampler",
    "Shares": "WeightedSampler",
    "ImageSource": "ImageDataset",
    "JoinedSource": "ConcatDataset",
    "ExcludingSource": "Subset",
    "World": "DistContext",
    "TrainedBackbone": "MixedPrecisionBackbone",
    "WeightAverage": "ModelEma",
    "Keeper": "CheckpointManager",
    "Journal": "JsonlWriter",
    "Reporter": "MetricsLogger",
    "RowUpdate": "RowOptimizer",
    "WorkBuffer": "WorkspaceBuffer",
    "PublishedRun": "ArcfaceTorchRun",
}
FUNCTIONS = {
    "join_world": "init_distributed",
    "leave_world": "destroy_distributed",
    "alikeness": "mean_pairwise_cosine",
    "moved_parameters": "optimized_parameters",
    "roundings": "sr_counter",
    "set_aside_earlier_run": "archive_earlier_run",
    "sweep": "remove_incomplete",
    "named": "list_checkpoints",
    "together": "run_on_all_ranks",
    "damage": "find_corruption",
    "differs": "verify_file",
    "superfluous": "expired",
    "pointed_to": "resolve_pointer",
    "embeds_ahead": "needs_full_batch",
    "rank_0_alone": "rank0_equivalent",
    "settle_buckets": "parallelize",
    "restore_if": "restore_where",
    "let_go": "resume",
    "begin_anew": "reset",
    "stand_ins": "replacements",
    "find_needs": "estimate_requirements",
    "who_is_lost": "find_stragglers",
    "target_places": "target_rank",
    "readable_loss": "reference_loss",
    "cast": "post",
    "see": "observe",
}
KEYS = {
    "head_buffer_mib": "head_workspace_mib",
    "head_device": "head_offload",
    "all_reduce_dtype": "grad_reduce_dtype",
    "zero": "zero_stage",
    "sub_centres": "sub_centers",
}
BRITISH = re.compile(
    "centre|colour|behaviour|honour|neighbour|favour|grey|labelled|modelled|artefact|licence|"
    "(normal|initial|util|serial|local|recogn|summar|organ|synchron|material|random|parallel)is[ei]"
    "|optimis[ei]"
)
OLD_NAMES = ("head", "margins", "parallel")  # work for one release (tests/test_moved.py)


def files() -> list[Path]:
    """The product's modules, without those that only hold old names."""
    found = [ROOT / f"{name}.py" for name in ENTRY_POINTS]
    for package in PACKAGES:
        if package not in ("tests", *OLD_NAMES):
            found += (ROOT / package).rglob("*.py")
    return sorted(path for path in found if path != ROOT / "eval" / "embedder.py")


def public_names(tree: ast.AST) -> tuple[set[str], set[str], set[str]]:
    """Public classes; functions and methods; arguments, fields, attributes and variables."""
    classes: set[str] = set()
    functions: set[str] = set()
    values: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            classes.add(node.name)
            values |= {
                part.target.id
                for part in node.body
                if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name)
            }
        elif isinstance(node, ast.FunctionDef):
            functions.add(node.name)
            arguments = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
            values |= {argument.arg for argument in arguments}
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                for part in target.elts if isinstance(target, ast.Tuple) else [target]:
                    if isinstance(part, ast.Attribute):
                        values.add(part.attr)
                    elif isinstance(part, ast.Name):
                        values.add(part.id)
    kinds = (classes, functions, values)
    public = [{name for name in names if not name.startswith("_")} for names in kinds]
    return public[0], public[1], public[2]


@pytest.mark.parametrize("path", files(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_public_name_is_a_word_that_was_replaced_or_british(path: Path) -> None:
    if path.relative_to(ROOT).as_posix() != "arcshard/parallel/embedding.py":  # a layer's name
        assert path.stem not in MODULES, f"{path.stem}: {MODULES.get(path.stem)}"
    classes, functions, values = public_names(ast.parse(path.read_text()))
    for names, replaced in ((classes, CLASSES), (functions, FUNCTIONS)):
        for name in names & replaced.keys():
            raise AssertionError(f"{name}: the field's name is {replaced[name]}")
    for name in {path.stem} | classes | functions | values:
        assert not BRITISH.search(name.lower()), name


def test_no_config_key_is_a_word_that_was_replaced() -> None:
    keys = set(Config.model_fields)
    assert keys.isdisjoint(KEYS)
    assert set(KEYS.values()) <= keys
