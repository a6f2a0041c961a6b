import shutil

import pytest

pytestmark = pytest.mark.one_backend


@pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler")
def test_lstm_in_c(out):
    import c_header

    assert 0 < c_header.main(out) < 1e-6
    assert (
        "static const float W_hf[16][16] = {{" in (out / "lstm_weights.h").read_text()
    )
