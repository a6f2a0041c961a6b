"""The notebook runs, and its saved outputs are up to date."""

from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.one_backend,
    pytest.mark.slow,
    # From the client of the kernel.
    pytest.mark.filterwarnings("ignore::DeprecationWarning:zmq|jupyter_client"),
]

nbformat = pytest.importorskip("nbformat", reason="nbclient is not installed")
nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")

NOTEBOOK = Path(__file__).parents[2] / "examples" / "lstm_from_scratch.ipynb"
# From here on, outputs depend on the training.
TRAINS = "model.fit("


def printed(cell):
    saved = [output for output in cell.outputs if output.get("name") != "stderr"]
    return "".join(
        output.get("text") or output["data"].get("text/plain", "") for output in saved
    )


def count_images(cell):
    return sum("image/png" in output.get("data", {}) for output in cell.outputs)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@pytest.fixture(scope="module")
def saved():
    return nbformat.read(NOTEBOOK, as_version=4)


@pytest.fixture(scope="module")
def run(saved):
    """The notebook after a run, which raises an error in it."""
    again = nbformat.from_dict(saved)
    for cell in code_cells(again):
        cell.outputs, cell.execution_count = [], None
    folder = {"metadata": {"path": str(NOTEBOOK.parent)}}
    return nbclient.NotebookClient(again, timeout=600, resources=folder).execute()


def test_saved_outputs_are_of_one_run(saved):
    counts = [cell.execution_count for cell in code_cells(saved)]
    assert counts == list(range(1, len(counts) + 1))
    assert not [o for cell in code_cells(saved) for o in cell.outputs if "ename" in o]


def test_outputs_equal_the_saved_ones(saved, run):
    before_training = True
    for old, new in zip(code_cells(saved), code_cells(run), strict=True):
        before_training &= TRAINS not in old.source
        assert count_images(new) == count_images(old), old.source
        if before_training:
            assert printed(new) == printed(old), old.source
        else:
            assert bool(printed(new)) == bool(printed(old)), old.source
    assert not before_training


def test_numpy_equals_the_package_and_the_model_learns(run):
    cells = code_cells(run)
    said = "".join(map(printed, cells))
    assert said.count("True") == 5
    assert "False" not in said
    (training,) = [cell for cell in cells if TRAINS in cell.source]
    perplexity = float(printed(training).split()[1].rstrip(","))
    assert 1 < perplexity < 6  # a uniform guess is 27
