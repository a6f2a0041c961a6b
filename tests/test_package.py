import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import keras_scratch_lstm

ROOT = Path(__file__).parents[1]

WITHOUT = """
import sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == {!r}:
            raise ModuleNotFoundError("No module named " + name, name=name)
sys.meta_path.insert(0, Finder())
import keras_scratch_lstm
"""


def run(code, **environment):
    command, env = [sys.executable, "-c", code], {**os.environ, **environment}
    return subprocess.run(command, capture_output=True, text=True, env=env)


def test_public_names():
    assert set(keras_scratch_lstm.__all__) == {
        *("ScratchLSTM", "ScratchLSTMCell", "Gates", "GateTrace", "trace_gates"),
        *("PeepholeLSTMCell", "CoupledLSTMCell", "LayerNormLSTMCell"),
        *("ZoneoutLSTMCell", "DropConnectLSTMCell", "from_addons"),
        *("Perplexity", "PerplexityLogger", "GateMonitor"),
        *("Edit", "run_with_edits", "Ablation", "ablate_units", "trace_gradients"),
        *("contextual_decomposition", "Decomposition", "attribute"),
        *("Attribution", "Gradients", "Saturation", "token_features"),
        *("from_torch", "to_torch", "to_builtin", "to_scratch", "load_keras2"),
        *("export_litert", "LiteRTFile"),
        "load_keras2_weights",
    }
    assert all(hasattr(keras_scratch_lstm, name) for name in keras_scratch_lstm.__all__)


def test_version_is_that_of_the_changelog_and_the_citation():
    installed = importlib.metadata.version("keras-scratch-lstm")
    assert keras_scratch_lstm.__version__ == installed
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert re.search(rf"^## \[{re.escape(installed)}\]", changelog, re.MULTILINE)
    assert f"\nversion: {installed}\n" in (ROOT / "CITATION.cff").read_text()


@pytest.mark.slow
@pytest.mark.one_backend
@pytest.mark.parametrize("backend", ["tensorflow", "jax", "torch"])
def test_a_missing_backend_raises_an_error_with_a_remedy(backend):
    done = run(WITHOUT.format(backend), KERAS_BACKEND=backend)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: ")
    assert f"`pip install {backend}`" in last
    assert "KERAS_BACKEND" in last
