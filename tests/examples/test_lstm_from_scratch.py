"""The notebook runs, and its saved outputs are up to date."""

import copy
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.one_backend,
    pytest.mark.slow,
    # From the client of the kernel.
    pytest.mark.filterwarnings("ignore::DeprecationWarning:zmq|jupyter_client"),
]

NOTEBOOK = Path(__file__).parents[2] / "examples" / "lstm_from_scratch.ipynb"
# From here on, outputs depend on the training.
TRAINS = "model.fit("


def printed(cell):
    saved = [output for output in cell.outputs if output.get("name") != "stderr"]
    assert not [output for output in saved if "ename" in output]
    images = sum("image/png" in output.get("data", {}) for output in saved)
    return images, "".join(
        output.get("text") or output["data"].get("text/plain", "") for output in saved
    )


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@pytest.fixture(scope="module")
def saved():
    # Imported late, since it takes seconds.
    nbformat = pytest.importorskip("nbformat", reason="nbclient is not installed")
    return nbformat.read(NOTEBOOK, as_version=4)


@pytest.fixture(scope="module")
def run(saved):
    """The notebook after a run, which raises an error in it."""
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
    again = copy.deepcopy(saved)
    for cell in code_cells(again):
        cell.outputs, cell.execution_count = [], None
    folder = {"metadata": {"path": str(NOTEBOOK.parent)}}
    return nbclient.NotebookClient(again, timeout=600, resources=folder).execute()


def test_outputs_equal_the_saved_ones(saved, run):
    before_training = True
    for old, new in zip(code_cells(saved), code_cells(run), strict=True):
        before_training &= TRAINS not in old.source
        (images, text), (new_images, new_text) = printed(old), printed(new)
        assert new_images == images, old.source
        if before_training:
            assert new_text == text, old.source
        else:
            assert bool(new_text) == bool(text), old.source
    assert not before_training


def test_numpy_equals_the_package_and_the_model_learns(run):
    outputs = {cell.source: printed(cell)[1] for cell in code_cells(run)}
    said = "".join(outputs.values())
    assert said.count("True") == 5
    assert "False" not in said
    (training,) = [text for source, text in outputs.items() if TRAINS in source]
    assert 1 < float(training.split()[1].rstrip(",")) < 6  # a uniform guess is 27
