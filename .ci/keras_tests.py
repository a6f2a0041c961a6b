"""Runs Keras's own RNN tests on this package's layers.

    python .ci/keras_tests.py CHECKOUT [pytest arguments]

CHECKOUT is a clone of the Keras repository, which is also the Keras that is tested
with. In it, `LSTM` is `ScratchLSTM` and `LSTMCell` is `ScratchLSTMCell`, which have
four times as many weights, and four times as many regularization losses.
"""

import os
import sys
from pathlib import Path

import pytest

TESTS = [
    *(
        f"layers/rnn/{name}_test.py"
        for name in (
            "bidirectional",
            "dropout_rnn_cell",
            "lstm",
            "rnn",
            "stacked_rnn_cells",
            "time_distributed",
        )
    ),
    "layers/core/masking_test.py",
    "export/onnx_test.py::ExportONNXTest::test_standard_model_export_lstm",
    "saving/saving_lib_test.py::SavingBattleTest::test_bidirectional_lstm_saving",
]
COUNTS = ("trainable_weights", "non_trainable_weights", "losses")
# Why a test does not apply.
EXPECTED_FAILURES = {
    "test_fused_lstm_eligibility": "`Bidirectional` fuses only `keras.layers.LSTM`",
}


class Substitute:
    """A pytest plugin that substitutes the layers."""

    def pytest_sessionstart(self):
        import keras
        from keras.src import layers, testing

        import keras_scratch_lstm

        for name in ("LSTM", "LSTMCell"):
            ours = getattr(keras_scratch_lstm, f"Scratch{name}")
            setattr(keras.layers, name, ours)
            setattr(layers, name, ours)
        run_layer_test = testing.TestCase.run_layer_test

        def run_with_our_counts(test, layer_cls, init_kwargs, **kwargs):
            ours = layers.LSTM, layers.LSTMCell
            parts = keras.tree.flatten(init_kwargs)
            if layer_cls in ours or any(isinstance(part, ours) for part in parts):
                for name in COUNTS:
                    kwargs[f"expected_num_{name}"] = 4 * (
                        kwargs.get(f"expected_num_{name}") or 0
                    )
            if layer_cls is layers.LSTM and "supports_masking" in kwargs:
                kwargs["supports_masking"] = True  # False in Keras 3.16
            return run_layer_test(test, layer_cls, init_kwargs, **kwargs)

        testing.TestCase.run_layer_test = run_with_our_counts

    def pytest_collection_modifyitems(self, items):
        for item in items:
            if reason := EXPECTED_FAILURES.get(item.originalname):
                item.add_marker(pytest.mark.xfail(reason=reason, strict=True))


def main(checkout, *arguments):
    source = Path(checkout).resolve()
    sys.path.insert(0, str(source))
    os.chdir(source)
    files = [str(source / "keras" / "src" / test) for test in TESTS]
    options = ["-q", "-ra", "-p", "no:cacheprovider", "-c", os.devnull]
    return pytest.main([*options, *arguments, *files], plugins=[Substitute()])


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
