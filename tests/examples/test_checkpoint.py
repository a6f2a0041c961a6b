import json
import os
import random

import checkpoint
import keras
import numpy as np
import pytest
from checkpoint import Checkpoint, Checkpoints, FileError, Saved, replacing

from keras_scratch_lstm import PerplexityLogger, ScratchLSTM


@pytest.fixture
def files(tmp_path):
    return Checkpoints(tmp_path, "run", {"units": 8})


def saved(epochs):
    arrays = [np.full((3, 4), epochs, "float32"), np.arange(epochs)]
    random_state = json.loads(json.dumps(checkpoint.random_state()))
    return Saved(epochs, arrays, random_state, {"loss": [0.1] * epochs}, 1.5 * epochs)


def same(one, other):
    return all(
        np.array_equal(a, b) for a, b in zip(one.arrays, other.arrays, strict=True)
    ) and one._replace(arrays=None) == other._replace(arrays=None)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# --- files -------------------------------------------------------------------


def test_the_last_two_are_kept(files, tmp_path):
    assert files.load() is None
    for epochs in range(1, 12):
        files.save(saved(epochs))
    assert names(tmp_path) == ["run-10.npz", "run-11.npz"]
    assert same(files.load(), saved(11))
    with np.load(tmp_path / "run-10.npz") as file:  # in spite of what is behind it
        np.testing.assert_array_equal(file["arr_1"], np.arange(10))


def test_runs_of_one_folder_are_apart(files, tmp_path):
    Checkpoints(tmp_path, "run-2", {}).save(saved(3))
    Checkpoints(tmp_path, "other", {}).save(saved(4))
    files.save(saved(1))
    assert same(files.load(), saved(1))


def test_each_damage_is_seen(files, tmp_path, rng, capsys):
    files.save(saved(1))
    files.save(saved(2))
    path = tmp_path / "run-2.npz"
    whole = path.read_bytes()
    damaged = [whole[:size] for size in (0, 31, 32, *rng.integers(len(whole), size=20))]
    for bit in rng.integers(8 * len(whole), size=200):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << (bit % 8)
        damaged.append(bytes(flipped))
    damaged += [whole + b"\0", os.urandom(len(whole)), b"not a checkpoint"]
    for content in damaged:
        path.write_bytes(content)
        assert same(files.load(), saved(1))
        (line,) = capsys.readouterr().out.splitlines()
        assert line.startswith(f"{path} is damaged, or no checkpoint of this program")
    path.write_bytes(whole)
    assert same(files.load(), saved(2))


def test_the_damaged_one_gives_way_to_the_next(files, tmp_path):
    for epochs in (1, 2):
        files.save(saved(epochs))
    (tmp_path / "run-2.npz").write_bytes(b"")
    files.save(saved(2))
    files.save(saved(3))
    assert names(tmp_path) == ["run-2.npz", "run-3.npz"]
    assert same(files.load(), saved(3))


def test_a_stranger_with_a_high_number_costs_no_good_one(files, tmp_path):
    (tmp_path / "run-999.npz").write_bytes(b"a stranger's")
    for epochs in range(1, 5):
        files.save(saved(epochs))
    assert names(tmp_path) == ["run-3.npz", "run-4.npz", "run-999.npz"]


def test_none_that_is_whole_is_an_error(files, tmp_path):
    (tmp_path / "run-1.npz").write_bytes(b"")
    with pytest.raises(FileError, match="has no checkpoint of run that is whole"):
        files.load()
    assert names(tmp_path) == ["run-1.npz"]


def test_another_origin_is_refused(files, tmp_path):
    files.save(saved(1))
    other = Checkpoints(tmp_path, "run", {"units": 16, "seed": 1})
    message = "run-1.npz is of another run: units was 8 and is 16, seed was None and is"
    with pytest.raises(FileError, match=message):
        other.load()
    assert same(files.load(), saved(1))


@pytest.mark.parametrize("of_numpy", [True, False])
def test_a_whole_file_of_another_program(files, tmp_path, of_numpy):
    path = tmp_path / "run-1.npz"
    if of_numpy:
        np.savez(path, weights=np.zeros(3))
    else:
        path.write_bytes(b"something else")
    content = path.read_bytes()
    path.write_bytes(content + checkpoint.hashlib.sha256(content).digest())
    with pytest.raises(FileError, match="no checkpoint of run that is whole"):
        files.load()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), ValueError])
def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, error):
    path = tmp_path / "file"
    with replacing(path) as unfinished:
        unfinished.write_text("first")
        assert not path.exists()
    expected = FileError if isinstance(error, OSError) else ValueError

    def fail():
        with replacing(path) as unfinished:
            unfinished.write_text("sec")
            raise error

    with pytest.raises(expected) as raised:
        fail()
    if expected is FileError:
        assert str(raised.value) == (
            f"{path} cannot be written: No space left on device."
        )
    assert path.read_text() == "first"
    assert names(tmp_path) == ["file"]


# --- training ----------------------------------------------------------------


class Noise(keras.callbacks.Callback):
    """Draws from the random numbers that are not Keras's."""

    def on_epoch_end(self, epoch, logs=None):
        logs["python"], logs["numpy"] = random.random(), np.random.normal()


class AtEpoch(keras.callbacks.Callback):
    def __init__(self, epoch, act):
        super().__init__()
        self._epoch, self._act = epoch, act

    def on_epoch_begin(self, epoch, logs=None):
        if epoch == self._epoch:
            self._act(self.model)


def train(files, epochs, *callbacks):
    """Dropout, momentum, and states that go on from one epoch to the next."""
    keras.utils.set_random_seed(1)
    model = keras.Sequential(
        [
            keras.Input(batch_shape=(4, 5, 7)),
            ScratchLSTM(6, return_sequences=True, stateful=True, dropout=0.3, seed=3),
            keras.layers.Dropout(0.5, seed=4),
            keras.layers.Dense(7),
        ]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(0.01), loss)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(12, 5, 7)).astype("float32")
    y = rng.integers(7, size=(12, 5))
    logger = PerplexityLogger(verbose=0)
    callback = Checkpoint(files, model, logger, files.load())
    model.fit(
        x,
        y,
        batch_size=4,
        initial_epoch=callback.epochs,
        epochs=epochs,
        shuffle=False,
        verbose=0,
        callbacks=[logger, Noise(), *callbacks, callback],
    )
    return model, callback


def values(model):
    return [np.array(v).tobytes() for v in checkpoint.variables_of(model)]


def test_it_ends_as_if_nothing_had_happened(tmp_path):
    model, straight = train(Checkpoints(tmp_path, "straight", {}), 6)
    files = Checkpoints(tmp_path, "parts", {})
    for epochs in (2, 3, 6):
        random.seed()
        again, parts = train(files, epochs)
    assert values(again) == values(model)
    paths = [variable.path for variable in checkpoint.variables_of(model)]
    for part in ("seed_generator", "momentum", "iteration", "W_hf"):
        assert any(part in path for path in paths), part
    assert sum("state" in path for path in paths) >= 2
    assert len(set(straight.history["python"] + straight.history["numpy"])) == 12
    for key in ("loss", "perplexity", "python", "numpy"):
        assert parts.history[key] == straight.history[key], key
    one, other = files.load(), Checkpoints(tmp_path, "straight", {}).load()
    assert one.random == other.random
    assert one.seconds == parts.seconds > 0
    # Nothing is left to train.
    finished, callback = train(files, 6)
    assert values(finished) == values(model)
    assert callback.seconds == parts.seconds


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_epoch_that_is_not_finite_is_undone(files, tmp_path, value):
    good, _ = train(Checkpoints(tmp_path, "good", {}), 2)

    def spoil(model):
        model.layers[-1].bias.assign(np.full(7, value))

    model, callback = train(files, 9, AtEpoch(2, spoil))
    assert callback.failure == (
        "the loss of epoch 3 is nan; the weights after epoch 2 are kept"
    )
    assert callback.epochs == len(callback.history["loss"]) == 2
    assert values(model) == values(good)
    assert names(tmp_path) == ["good-1.npz", "good-2.npz", "run-1.npz", "run-2.npz"]


def test_weights_that_are_not_finite_are_not_saved(files, tmp_path):
    class Spoil(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            if epoch == 1:  # the loss was still finite
                self.model.layers[-1].bias.assign(np.full(7, np.inf))

    model, callback = train(files, 9, Spoil())
    assert callback.failure == (
        "after epoch 2 there are weights that are not finite; "
        "the weights after epoch 1 are kept"
    )
    assert all(np.isfinite(weight).all() for weight in model.get_weights())
    assert names(tmp_path) == ["run-1.npz"]


def test_nothing_is_kept_of_a_first_epoch_that_fails(files, tmp_path):
    def spoil(model):
        model.layers[-1].bias.assign(np.full(7, np.nan))

    _, callback = train(files, 9, AtEpoch(0, spoil))
    assert callback.failure == "the loss of epoch 1 is nan; nothing is kept"
    assert callback.epochs == 0
    assert names(tmp_path) == []
