"""The notebook runs from top to bottom, and says what it says in the repository."""

from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.one_backend,
    pytest.mark.slow,
    # Of the kernel's client, in the process that waits.
    pytest.mark.filterwarnings("ignore::DeprecationWarning:zmq|jupyter_client"),
]

nbformat = pytest.importorskip("nbformat", reason="nbclient is not installed")
nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")

NOTEBOOK = Path(__file__).parents[2] / "examples" / "lstm_from_scratch.ipynb"
# From here on, numbers depend on a training.
TRAINS = "model.fit("


def printed(cell):
    kept = [output for output in cell.outputs if output.get("name") != "stderr"]
    return "".join(
        output.get("text") or output["data"].get("text/plain", "") for output in kept
    )


def pictures(cell):
    return sum("image/png" in output.get("data", {}) for output in cell.outputs)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@pytest.fixture(scope="module")
def kept():
    return nbformat.read(NOTEBOOK, as_version=4)


@pytest.fixture(scope="module")
def run(kept):
    """The notebook after a run: an error in it is raised here."""
    again = nbformat.from_dict(kept)
    for cell in code_cells(again):
        cell.outputs, cell.execution_count = [], None
    folder = {"metadata": {"path": str(NOTEBOOK.parent)}}
    return nbclient.NotebookClient(again, timeout=600, resources=folder).execute()


def test_it_is_kept_as_it_was_run(kept):
    counts = [cell.execution_count for cell in code_cells(kept)]
    assert counts == list(range(1, len(counts) + 1))
    assert not [o for cell in code_cells(kept) for o in cell.outputs if "ename" in o]


def test_it_prints_and_draws_what_is_kept(kept, run):
    before_training = True
    for old, new in zip(code_cells(kept), code_cells(run), strict=True):
        before_training &= TRAINS not in old.source
        assert pictures(new) == pictures(old), old.source
        if before_training:
            assert printed(new) == printed(old), old.source
        else:
            assert bool(printed(new)) == bool(printed(old)), old.source
    assert not before_training


def test_by_hand_it_is_the_same_as_by_the_package(run):
    said = "".join(printed(cell) for cell in code_cells(run))
    assert said.count("True") == 5
    assert "False" not in said


def test_it_learns(run):
    (training,) = [cell for cell in code_cells(run) if TRAINS in cell.source]
    perplexity = float(printed(training).split()[1])
    assert 1 < perplexity < 6  # a blind guess is 27
