import shutil

import pytest

pytestmark = pytest.mark.one_backend


@pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler")
def test_lstm_in_c(out, capsys):
    import c_header

    assert c_header.main(["--out", str(out)]) == 0
    difference = capsys.readouterr().out.rpartition(" ")[2]
    assert 0 < float(difference) < 1e-6
    header = (out / "lstm_weights.h").read_text()
    assert "static const float W_hf[16][16] = {{" in header
