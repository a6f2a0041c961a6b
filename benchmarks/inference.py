"""Benchmark the forward pass and the generation of text.

`throughput.py --inference` runs it on each backend.
"""

import statistics

from contenders import VOCABULARY, build_model, layers, random_text
from measuring import interleave, rates, ratios, seconds


def measure_inference(backend, options):
    """Forward pass over whole sequences, and generation of text."""
    import numpy as np

    shape, units = (1, options.batch, options.time), options.units
    x, _ = random_text(shape)
    functions = {}
    for name, make in layers().items():
        model = build_model(make, units, shape)
        functions[name] = lambda model=model: [
            model.predict_on_batch(x) for _ in range(options.batches)
        ]
        functions[name]()
    times = interleave(functions, options.rounds)
    tokens = options.batches * options.batch * options.time

    compiled, by_predict = generators(units, options.characters)
    start = np.array([[1]], "int32")
    assert (compiled(start) == by_predict(start)).all()
    few = max(1, options.characters // 20)
    generation = {"compiled loop": [], "`predict` per character": []}
    for _ in range(options.rounds):
        generation["compiled loop"].append(
            seconds(compiled, start) / options.characters
        )
        generation["`predict` per character"].append(
            seconds(by_predict, start, few) / few
        )
    compiled_times, predict_times = generation.values()
    return {
        "tokens_per_sec": rates(times, tokens),
        "ratios": ratios(times),
        "characters_per_sec": rates(generation, 1),
        "generation_ratio": statistics.median(
            slow / fast
            for fast, slow in zip(compiled_times, predict_times, strict=True)
        ),
    }


def generators(units, characters):
    """Two implementations of greedy generation, which give the same text."""
    import keras
    import numpy as np
    from keras import ops

    from keras_scratch_lstm import ScratchLSTM, ScratchLSTMCell

    class Generator(keras.Model):
        """Generates all characters in one call, which `predict` compiles."""

        def __init__(self, cell, logits):
            super().__init__()
            self.cell, self.logits = cell, logits
            self.step = self.one_step
            if keras.backend.backend() == "torch":  # where Keras compiles nothing
                import torch

                # The default backend is half as fast again, but needs a C++ compiler.
                self.step = torch.compile(self.one_step, backend="eager")

        def one_step(self, token, h, c):
            x = ops.one_hot(token, VOCABULARY, dtype="float32")
            # `call` itself, since `__call__` would take most of the time.
            output, (h, c) = self.cell.call(x, [h, c])
            token = ops.cast(ops.argmax(self.logits.call(output), -1), "int32")
            return token, h, c

        def call(self, token):
            def body(k, carry):
                tokens, *carry = carry
                token, h, c = self.step(*carry)
                return ops.slice_update(tokens, (k,), token), token, h, c

            tokens = ops.zeros((characters,), "int32")
            h, c = self.cell.get_initial_state(batch_size=1)
            carry = tokens, token[:, 0], h, c
            return ops.fori_loop(0, characters, body, carry)[0][None]

    keras.utils.set_random_seed(0)
    cell = ScratchLSTMCell(units, recurrent_initializer="glorot_normal")
    logits = keras.layers.Dense(VOCABULARY)
    one_step = keras.Sequential(
        [
            keras.Input(batch_shape=(1, 1), dtype="int32"),
            keras.layers.Embedding(
                VOCABULARY, VOCABULARY, embeddings_initializer="identity"
            ),
            ScratchLSTM(cell=cell, stateful=True),
            logits,
        ]
    )
    generator = Generator(cell, logits)

    def compiled(token):
        return generator.predict_on_batch(token)[0]

    def by_predict(token, length=characters):
        one_step.layers[-2].reset_state()
        found = []
        for _ in range(length):
            token = one_step.predict(token, verbose=0).argmax(-1)[:, None]
            found.append(token.item())
        return np.array(found)

    return compiled, by_predict
