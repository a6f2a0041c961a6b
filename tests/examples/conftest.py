import pytest


@pytest.fixture
def text(tmp_path, rng):
    """The path of a random text."""
    path = tmp_path / "own.txt"
    path.write_text("".join(rng.choice(list('aeB, 1"\n'), 2000)))
    return path


@pytest.fixture
def out(tmp_path):
    return tmp_path / "runs" / "here"
