"""Files of Keras 2, made once."""

import fcntl
import os
import random
from pathlib import Path

import pytest
from keras2_files import run_keras2


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """The folder with the files of `tf-keras`, made once for all test processes.

    `KERAS2_FILES` names one to keep for later runs.
    """
    pytest.importorskip("tf_keras", reason="tf-keras is not installed")
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    folder = Path(os.environ.get("KERAS2_FILES", folder))
    folder.mkdir(exist_ok=True)
    with (folder / "keras2.lock").open("a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        folder, seed = folder / "keras2", folder / "keras2.seed"
        if not seed.exists():
            folder.mkdir()
            default = random.SystemRandom().randrange(2**31)
            run_keras2(folder, os.environ.get("TEST_SEED", default))
            seed.write_text("done")
    return folder
