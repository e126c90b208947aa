"""The notebook runs from top to bottom, and what it shows is what it computed."""

from __future__ import annotations

import base64
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = (
    Path(__file__).resolve().parent.parent / "docs" / "tutorials" / "model_parallel_arcface.ipynb"
)
LARGEST_MIB = 1.0


@pytest.fixture(scope="module")
def kept() -> Any:
    return nbformat.read(NOTEBOOK, as_version=4)


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook: Any) -> list[Any]:
    return [output for cell in code_cells(notebook) for output in cell.outputs]


def printed(notebook: Any) -> str:
    return "".join(output.text for output in outputs(notebook) if output.output_type == "stream")


def test_the_notebook_runs_from_top_to_bottom(
    kept: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ARCSHARD_QUICK", "1")
    for variable in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "MPLCONFIGDIR"):  # nothing in the home
        monkeypatch.setenv(variable, str(tmp_path / variable))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("MPLBACKEND", raising=False)
    fresh = nbformat.from_dict(kept)
    for cell in code_cells(fresh):
        cell.outputs, cell.execution_count = [], None
    # Errors of a cell are raised here with its source and traceback.
    folder = {"metadata": {"path": str(NOTEBOOK.parent)}}
    NotebookClient(fresh, timeout=300, kernel_name="python3", resources=folder).execute()
    assert "quick run" in printed(fresh)
    pictures = [count_pictures(notebook) for notebook in (fresh, kept)]
    assert pictures[0] == pictures[1]


def count_pictures(notebook: Any) -> int:
    return sum("image/png" in output.get("data", {}) for output in outputs(notebook))


def test_the_kept_file_was_executed_in_full_in_order_without_errors(kept: Any) -> None:
    nbformat.validate(kept)
    cells = code_cells(kept)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert "full run" in printed(kept)
    for output in outputs(kept):
        assert output.output_type in ("stream", "display_data")
        assert output.get("name", "stdout") == "stdout", output.text  # no warnings


def test_the_kept_file_is_small_and_has_its_pictures(kept: Any) -> None:
    assert NOTEBOOK.stat().st_size < LARGEST_MIB * 2**20
    assert count_pictures(kept) >= 6
    for output in outputs(kept):
        if "image/png" in output.get("data", {}):
            assert base64.b64decode(output.data["image/png"])[:4] == b"\x89PNG"


def test_the_kept_file_names_no_place_of_the_machine_it_was_run_on(kept: Any) -> None:
    assert not re.search(r"/(tmp|home|root|work|Users)\b", printed(kept))
    assert set(kept.metadata) <= {"kernelspec", "language_info"}
    assert all(set(cell.metadata) <= {"tags", "execution"} for cell in kept.cells)


def test_every_link_of_the_notebook_leads_somewhere(kept: Any) -> None:
    text = "\n".join(cell.source for cell in kept.cells if cell.cell_type == "markdown")
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert links
    for link in links:
        assert (NOTEBOOK.parent / link).exists(), link
    for path in re.findall(r"`([a-z_]+(?:/[a-z_0-9]+)+\.py|[a-z_0-9]+\.py)`", text):
        assert (NOTEBOOK.parents[2] / path).exists(), path
