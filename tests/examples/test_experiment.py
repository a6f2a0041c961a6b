import re

import experiment
import pytest
from PIL import Image

PLOTS = ("ablation", "gradients", "integrated_gradients", "contextual_decomposition")


@pytest.mark.slow
def test_the_unit_that_carries_the_number_is_found_and_patched(out, capsys):
    assert experiment.main(["--steps", "6", "--epochs", "12", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    print(printed)
    error = float(re.search(r"lstm: mean squared error (.*)", printed)[1])
    assert error < 0.05  # a constant has 0.33
    assert float(re.search(r"changes the loss by (.*)", printed)[1]) > 0.1
    assert int(re.search(r"moves (.*)% of the way", printed)[1]) > 50
    shares = re.findall(r"first time step has (.*)% of the variance", printed)
    assert all(int(share) > 50 for share in shares)
    assert len(shares) == 2
    for name in PLOTS:
        with Image.open(out / f"{name}.png") as image:
            assert image.width > 900
