"""Train on "The Time Machine" on several devices or hosts, data-parallel.

Each replica trains on its rows of each batch. The results equal those of one device.

    python examples/distributed.py                       # all GPUs of this host
    python examples/distributed.py --virtual-devices 2   # the CPU as two devices
    python examples/distributed.py --resume              # continue after a lost process
    KERAS_BACKEND=jax srun python examples/distributed.py --cluster   # several hosts

With --cluster, which needs JAX, the processes of SLURM and Open MPI are found. Other
launchers set KERAS_DISTRIBUTION_JOB_ADDRESSES (host:port of process 0),
KERAS_DISTRIBUTION_NUM_PROCESSES and KERAS_DISTRIBUTION_PROCESS_ID.

Process 0 saves a checkpoint after each epoch. With --resume, all processes read it, so
the hosts must share the folder --out.
"""

import sys
from pathlib import Path

from helpers import common
from helpers.common import ExampleError


def parse_arguments(argv=None):
    parser = common.create_parser("distributed.py", __doc__)
    add, integer = parser.add_argument, common.positive_integer
    add("--virtual-devices", type=integer, help="split the CPU, to try it without GPUs")
    add("--cluster", action="store_true", help="join the processes of a launcher")
    common.add_training_options(parser, "runs/distributed", "random")
    text = "continue the run in --out; pass the same options, or more --epochs"
    add("--resume", action="store_true", help=text)
    add("--stream", type=Path, help="text of any size, used without --max-tokens")
    return parser.parse_args(argv)


if __name__ == "__main__":
    parse_arguments()  # Answer --help before the imports below, which take seconds.
    common.load_keras()

import contextlib
import json

import keras
from helpers.book_text import PREFIXES, Minibatches
from helpers.resume import Checkpoint, prepare
from helpers.stream_text import tokenize_file
from time_machine import ResetStates, create_model, generate, load_data, settings

from keras_scratch_lstm import PerplexityLogger

BACKEND = keras.backend.backend()


def main(argv=None):
    args = parse_arguments(argv)
    try:
        check(args)
        with distribution(args) as (replicas, rank, processes):
            if args.batch_size % len(replicas):
                raise ExampleError(
                    "--batch-size must be a multiple of the number of replicas, "
                    f"{len(replicas)}. Received: {args.batch_size}"
                )
            args.out.mkdir(parents=True, exist_ok=True)
            if args.stream:
                vocabulary, corpus = tokenize_file(args.stream)
                size = args.batch_size, args.num_steps
                batches = Minibatches(corpus, *size, args.sampling, args.seed)
            else:
                _, vocabulary, batches = load_data(args)
                corpus = batches.corpus
            rows = args.batch_size // processes
            batches.rows = slice(rank * rows, (rank + 1) * rows)
            if rank == 0:
                print(f"{len(replicas)} replicas: {', '.join(replicas)}")
            if rank == 0 or args.resume:
                prepare(args.out / "checkpoints", settings(args, corpus), args.resume)
            checkpoint = train(args, vocabulary, batches, is_first=rank == 0)
        if rank == 0:  # outside the scope, in which all processes must take part
            report(checkpoint, vocabulary, args.out)
    except (ExampleError, OSError) as error:
        return f"distributed.py: error: {error}"
    return 0


def check(args):
    if BACKEND == "torch":
        raise ExampleError("KERAS_BACKEND must be jax or tensorflow. Received: torch")
    if BACKEND == "jax":
        return
    if args.cluster or args.sampling == "sequential":
        raise ExampleError(
            "--cluster and sequential --sampling need KERAS_BACKEND=jax."
        )


@contextlib.contextmanager
def distribution(args):
    """Yields the replicas' names, and the rank and the number of processes."""
    if BACKEND == "tensorflow":
        import tensorflow as tf

        if args.virtual_devices:
            tf.config.set_visible_devices([], "GPU")
            tf.config.set_logical_device_configuration(
                tf.config.list_physical_devices("CPU")[0],
                [tf.config.LogicalDeviceConfiguration()] * args.virtual_devices,
            )
        devices = tf.config.list_logical_devices
        names = [device.name for device in devices("GPU") or devices("CPU")]
        with tf.distribute.MirroredStrategy(names).scope():
            yield names, 0, 1
        return

    import jax

    if args.virtual_devices:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", args.virtual_devices)
    if args.cluster:
        try:
            keras.distribution.initialize()
        except (ValueError, RuntimeError) as error:
            raise ExampleError(f"--cluster needs a launcher: {error}") from None
    # Each process loads its own rows, hence no automatic sharding of the data set.
    parallel = keras.distribution.DataParallel(auto_shard_dataset=False)
    with parallel.scope():
        names = keras.distribution.list_devices()
        yield names, jax.process_index(), jax.process_count()


def train(args, vocabulary, batches, is_first):
    optimizer = ClippedSGD if BACKEND == "tensorflow" else keras.optimizers.SGD
    model = create_model("ScratchLSTM", args, vocabulary, optimizer)
    folder, name = args.out / "checkpoints", "ScratchLSTM"
    checkpoint = Checkpoint(folder, name, model, is_first, is_first or args.resume)
    batches.first_epoch = checkpoint.epochs
    model.fit(
        batches,
        initial_epoch=checkpoint.epochs,
        epochs=args.epochs,
        steps_per_epoch=batches.steps_per_epoch,
        shuffle=False,
        verbose=2 if is_first else 0,
        callbacks=[PerplexityLogger(verbose=is_first), ResetStates(), checkpoint],
    )
    return checkpoint


def report(checkpoint, vocabulary, out):
    """Saves the model and its history, and prints generated text."""
    if checkpoint.failure:
        raise ExampleError(f"{checkpoint.failure}.")
    (out / "history.json").write_text(json.dumps(checkpoint.history, indent=2))
    checkpoint.model.save(out / "model.keras")
    model = keras.saving.load_model(out / "model.keras")  # with weights on one device
    for prefix in PREFIXES:
        print(f"    {generate(model, vocabulary, prefix)}")
    print(f"Report: {out}")


@keras.saving.register_keras_serializable("distributed")
class ClippedSGD(keras.optimizers.SGD):
    """SGD that clips the sum of all replicas' gradients, not each replica's."""

    def apply_gradients(self, grads_and_vars):
        import tensorflow as tf

        gradients, variables = zip(*grads_and_vars, strict=True)
        context = tf.distribute.get_replica_context()
        gradients = context.all_reduce("sum", list(gradients))
        gradients, _ = tf.clip_by_global_norm(gradients, self.global_clipnorm)
        # Keras is about to sum these, which are equal, over the replicas.
        gradients = [g / context.num_replicas_in_sync for g in gradients]
        return super().apply_gradients(list(zip(gradients, variables, strict=True)))


if __name__ == "__main__":
    sys.exit(main())
