import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import distributed
import keras
import numpy as np
import pytest
from book_text import Minibatches, Vocabulary, tokenize
from time_machine import build_model

from keras_scratch_lstm import Perplexity, PerplexityLogger, ScratchLSTM

EXAMPLE = Path(distributed.__file__)
SCALE_OUT = EXAMPLE.parents[1] / "docs" / "distributed-training.md"
BACKEND = keras.backend.backend()
UNITS, ROWS, STEPS, EPOCHS, SEED = 8, 8, 6, 3, 5
SMALL = ["--units", str(UNITS), "--batch-size", str(ROWS), "--num-steps", str(STEPS)]
SMALL += ["--epochs", str(EPOCHS), "--seed", str(SEED)]
PATIENCE = 500  # seconds, on a machine that has much else to do

on_jax = pytest.mark.skipif(BACKEND != "jax", reason="what JAX alone has")
on_replicas = pytest.mark.skipif(
    BACKEND != "tensorflow" or not distributed.METRICS_ARE_SUMMED,
    reason="what TensorFlow alone has, and with a Keras that sums its metrics",
)
on_tensorflow = pytest.mark.skipif(
    BACKEND != "tensorflow", reason="what TensorFlow alone has"
)
distributing = pytest.mark.skipif(
    BACKEND == "torch", reason="Keras on torch distributes nothing"
)


@pytest.fixture
def own_text(tmp_path, rng):
    path = tmp_path / "own.txt"
    path.write_text("".join(rng.choice(list("abcde \n"), 600)))
    return path


@pytest.fixture
def out(tmp_path):
    return tmp_path / "runs" / "here"


def command(*arguments):
    return [sys.executable, str(EXAMPLE), "--timeout", str(PATIENCE), *arguments]


def run(*arguments):
    return subprocess.run(
        command(*arguments), capture_output=True, text=True, timeout=PATIENCE
    )


def the_one_sentence(stderr):
    """The error in what a program has said beside the logs of its libraries."""
    (sentence,) = re.findall("^distributed.py: error: (.*)", stderr, re.M)
    assert "Traceback" not in stderr
    return sentence


# --- equal numbers -----------------------------------------------------------


def on_one_device(corpus, vocabulary_size, sampling):
    """The numbers of a plain `fit`, without any strategy."""
    batches = Minibatches(corpus, ROWS, STEPS, sampling, SEED)
    keras.utils.set_random_seed(SEED)
    stateful = sampling == "sequential"
    layer = ScratchLSTM(UNITS, return_sequences=True, stateful=stateful)
    model = build_model(layer, vocabulary_size, ROWS, STEPS)
    model.compile(
        keras.optimizers.SGD(1.0, global_clipnorm=1.0),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=[Perplexity()],
    )
    reset = keras.callbacks.LambdaCallback(
        on_epoch_begin=lambda epoch, logs: stateful and layer.reset_state()
    )
    logger = PerplexityLogger(verbose=0)
    history = model.fit(
        batches,
        epochs=EPOCHS,
        steps_per_epoch=batches.steps_per_epoch,
        shuffle=False,
        verbose=0,
        callbacks=[logger, reset],
    ).history
    tokens = EPOCHS * batches.steps_per_epoch * ROWS * STEPS
    assert logger.tokens_per_sec * logger.seconds == pytest.approx(tokens)
    return history, tokens


@distributing
@pytest.mark.parametrize(
    ("options", "source", "sampling", "replicas"),
    [
        pytest.param(
            ["--devices", "4", "--virtual"], "--own-text", "random", 4, marks=on_jax
        ),
        pytest.param(["--processes", "2"], "--stream", "sequential", 2, marks=on_jax),
        pytest.param(
            ["--devices", "2", "--virtual"],
            "--own-text",
            "random",
            2,
            marks=on_replicas,
        ),
    ],
    ids=["4 devices", "2 processes", "2 replicas"],
)
def test_the_numbers_are_those_of_one_device(
    own_text, out, options, source, sampling, replicas
):
    process = run(
        *options,
        source,
        str(own_text),
        "--sampling",
        sampling,
        "--out",
        str(out),
        *SMALL,
    )
    assert process.returncode == 0, process.stderr
    found = json.loads((out / "results.json").read_text())
    assert found["recurrence"] == BACKEND == found["backend"]
    assert len(found["replicas"]) == len(set(found["replicas"])) == replicas

    tokens = tokenize(own_text.read_text())
    vocabulary = Vocabulary(tokens)
    corpus = vocabulary.encode(tokens)
    history, count = on_one_device(corpus, len(vocabulary), sampling)
    assert found["tokens"] == count
    for key in ("loss", "perplexity"):
        assert len(set(history[key])) == EPOCHS
        np.testing.assert_allclose(found["history"][key], history[key], rtol=1e-4)

    rows = f"with {ROWS // replicas} of the {ROWS} rows each"
    assert rows in process.stdout
    assert found["closing_line"] in process.stdout
    assert "    time traveller" in process.stdout
    if BACKEND == "tensorflow":
        assert "does not survive that on TensorFlow" in process.stdout
    model = keras.saving.load_model(out / "model.keras")
    assert model.get_layer("rnn").cell.units == UNITS


@on_replicas
def test_a_stream_is_split_among_replicas(own_text, out, tmp_path):
    found = []
    for devices in ("1", "2"):
        folder = out / devices
        process = run(
            *("--devices", devices, "--virtual", "--stream", str(own_text)),
            *("--out", str(folder), *SMALL),
        )
        assert process.returncode == 0, process.stderr
        found.append(json.loads((folder / "results.json").read_text()))
    one, two = found
    assert one["tokens"] == two["tokens"]
    for key in ("loss", "perplexity"):
        np.testing.assert_allclose(one["history"][key], two["history"][key], rtol=1e-4)


@on_jax
def test_weights_can_be_laid_out_by_gate(tmp_path):
    (block,) = re.findall(r"^```python\n(.*?)^```", SCALE_OUT.read_text(), re.S | re.M)
    check = """
assert len(devices) == 4
assert model.get_layer("lstm").recurrence == "jax"
cell = model.get_layer("lstm").cell
momenta = [v for v in model.optimizer.variables if "momentum" in v.path]
for weights in (cell.weights, momenta[:12]):
    assert len(weights) == 12
    for weight in weights:
        shards = weight.value.addressable_shards
        assert len({shard.device for shard in shards}) == 4
        assert {shard.data.shape for shard in shards} == {
            (*weight.shape[:-1], weight.shape[-1] // 4)
        }
for one, other in zip(model.get_weights(), alone.get_weights(), strict=True):
    assert np.allclose(one, other, atol=1e-4)
"""
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
    }
    process = subprocess.run(
        [sys.executable, "-c", block + check],
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("(64, 16)") == 4


# --- faults ------------------------------------------------------------------


@on_jax
def test_the_others_end_where_a_process_is_killed(own_text, out):
    """Two processes, each started by itself, as on two machines."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    arguments = ["--processes", "2", "--coordinator", coordinator, *SMALL]
    arguments += ["--own-text", str(own_text), "--epochs", "1000000"]
    processes = [
        subprocess.Popen(
            command(*arguments, "--rank", str(rank), "--out", str(out / str(rank))),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
        )
        for rank in (0, 1)
    ]
    first, second = processes
    try:
        assert any(line.startswith("epoch 1: ") for line in first.stdout)
        second.send_signal(signal.SIGTERM)
        assert second.wait(PATIENCE) == 128 + signal.SIGTERM
        _, stderr = first.communicate(timeout=PATIENCE)
    finally:
        for process in processes:
            process.terminate()
            process.communicate()
    assert first.returncode == 1
    # Whether the step or JAX's own watch comes first is a matter of luck.
    assert re.match(
        "process 0: a step failed, as it does where another process is lost|"
        "process 0 was ended by JAX, as it lost another process",
        the_one_sentence(stderr),
    )


@on_jax
@pytest.mark.parametrize(
    ("rank", "sentence"),
    [
        ("0", "not all of the 2 processes came to the coordinator at {where}"),
        ("1", "the coordinator at {where} cannot be reached, or waits for others"),
    ],
)
def test_nobody_waits_for_ever(own_text, out, rank, sentence):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = f"127.0.0.1:{free.getsockname()[1]}"
    process = run(
        *("--processes", "2", "--rank", rank, "--coordinator", where),
        *("--own-text", str(own_text), "--out", str(out), "--timeout", "2", *SMALL),
    )
    assert process.returncode == 1
    expected = f"process {rank}: {sentence.format(where=where)} (after 2 s, --timeout)."
    assert the_one_sentence(process.stderr) == expected


ENDINGS = {
    "killed": "import os; os.kill(os.getpid(), 9)",
    "aborted": "import os; os.abort()",
    "said": "import sys; sys.exit('distributed.py: error: no text.')",
    "failed": "import sys; sys.exit(7)",
}


@pytest.mark.parametrize(
    ("endings", "expected"),
    [
        (["", ""], 0),
        (["", "killed"], "process 1 was ended by SIGKILL; {log} has what it said."),
        (["aborted", "killed"], "process 1 was ended by SIGKILL; {log} has what"),
        (["aborted", ""], "process 0 was ended by JAX, as it lost another process; "),
        (["", "failed"], "process 1 ended with status 7; {log} has what it said."),
        (["", "said"], "process 1: no text."),
    ],
)
def test_the_launcher_says_who_ended_the_run(tmp_path, endings, expected):
    workers = {}
    args = SimpleNamespace(out=tmp_path)
    for rank, ending in enumerate(endings):
        with open(distributed.log_of(rank, args), "wb") as log:
            code = ["-c", ENDINGS.get(ending, "")]
            workers[rank] = subprocess.Popen([sys.executable, *code], stderr=log)
    for worker in workers.values():
        worker.wait()
    result = distributed.wait(workers, args)
    if expected:
        rank = expected.partition(" ")[2][0]
        log = tmp_path / f"process-{rank}.log"
        start = f"distributed.py: error: {expected.format(log=log)}"
        assert result.startswith(start)
    else:
        assert result == 0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        pytest.param(
            ["--devices", "3"],
            "--batch-size is 8; expected a multiple of 3, the number of replicas",
            marks=distributing,
        ),
        pytest.param(
            ["--processes", "3"],
            "--batch-size is 8; expected a multiple of 3, the number of replicas",
            marks=on_jax,
        ),
        pytest.param(
            ["--devices", "8"],
            r"--devices is 8; expected at most \d, as .* or --virtual with it",
            marks=distributing,
        ),
        pytest.param(["--virtual"], "--virtual needs --devices", marks=distributing),
        pytest.param(
            ["--rank", "0"], "--rank and --coordinator need each", marks=distributing
        ),
        pytest.param(
            ["--processes", "2", "--rank", "2", "--coordinator", "here:1"],
            "--rank is 2; expected one below 2, the number of --processes",
            marks=on_jax,
        ),
        pytest.param(
            ["--processes", "2", "--rank", "1", "--coordinator", "here"],
            "--coordinator is 'here'; expected a host and a port, such as",
            marks=on_jax,
        ),
        pytest.param(
            ["--stream", "nowhere.txt"],
            "nowhere.txt cannot be read: No such file",
            marks=distributing,
        ),
        pytest.param(
            ["--processes", "2"],
            "--processes needs KERAS_BACKEND=jax: .*MultiWorkerMirroredStrategy",
            marks=on_tensorflow,
        ),
        pytest.param(
            ["--sampling", "sequential"],
            "--sampling is sequential; expected random: MirroredStrategy splits each",
            marks=on_tensorflow,
        ),
        pytest.param(
            [],
            "Keras trains on several devices on tensorflow and jax; set KERAS_BACKEND",
            marks=pytest.mark.skipif(BACKEND != "torch", reason="what torch has not"),
        ),
    ],
)
def test_what_cannot_be_is_a_sentence(own_text, out, arguments, sentence):
    if "--stream" not in arguments:
        arguments = [*arguments, "--own-text", str(own_text)]
    result = distributed.main([*SMALL, "--out", str(out), *arguments])
    assert re.match(f"distributed.py: error: {sentence}", result)
    assert "\n" not in result
