"""Run a Keras LSTM in plain C, with its weights as a header.

python examples/c_header.py
"""

import subprocess
import sys
from pathlib import Path

from helpers import common


def parse_arguments(argv=None):
    parser = common.create_parser("c_header.py", __doc__)
    out = {"type": Path, "default": Path("runs/c"), "help": "output folder"}
    parser.add_argument("--out", **out)
    return parser.parse_args(argv)


if __name__ == "__main__":
    parse_arguments()  # Answer --help before the imports below, which take seconds.
    common.load_keras()

import keras
import numpy as np

from keras_scratch_lstm import to_scratch


def main(argv=None):
    folder = parse_arguments(argv).out
    folder.mkdir(parents=True, exist_ok=True)
    lstm, x = keras.layers.LSTM(16), np.random.default_rng(0).normal(size=(1, 50, 3))
    expected = keras.ops.convert_to_numpy(lstm(x))[0]
    lines = [f"enum {{ FEATURES = {x.shape[-1]}, UNITS = {lstm.units} }};"]
    for weight in to_scratch(lstm).cell.weights:
        values = str(weight.numpy().tolist()).translate(str.maketrans("[]", "{}"))
        sizes = "".join(f"[{size}]" for size in weight.shape)
        lines.append(f"static const float {weight.name}{sizes} = {values};")
    (folder / "lstm_weights.h").write_text("\n".join(lines) + "\n")
    source, program = Path(__file__).with_name("lstm.c"), str(folder / "lstm")
    command = ["cc", "-std=c99", "-O2", "-Wall", "-Werror", f"-I{folder}", str(source)]
    subprocess.run([*command, "-lm", "-o", program], check=True)
    run = subprocess.run(program, input=" ".join(map(str, x.flat)).encode(), stdout=-1)
    difference = np.abs(np.array(run.stdout.split(), float) - expected).max()
    print(f"largest difference from Keras: {difference:.1e}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
