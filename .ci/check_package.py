"""Checks the files and the metadata of the sdist and the wheel."""

import subprocess
import sys
import tarfile
import zipfile
from email import message_from_string
from pathlib import Path

(wheel,) = Path(sys.argv[1]).glob("*.whl")
(sdist,) = Path(sys.argv[1]).glob("*.tar.gz")
tracked = subprocess.run(
    ["git", "ls-files"], check=True, capture_output=True, text=True
).stdout.splitlines()

with zipfile.ZipFile(wheel) as file:
    names = set(file.namelist())
    (info,) = {n.split("/")[0] for n in names if n.split("/")[0].endswith(".dist-info")}
    metadata = message_from_string(file.read(f"{info}/METADATA").decode())
code = {name.removeprefix("src/") for name in tracked if name.startswith("src/")}
assert "keras_scratch_lstm/py.typed" in code
found = {name for name in names if not name.startswith(info)}
assert found == code, found ^ code
assert f"{info}/licenses/LICENSE" in names

assert metadata["Name"] == "keras-scratch-lstm"
assert metadata["License-Expression"] == "Apache-2.0"
assert metadata["Requires-Python"] == ">=3.11"
assert metadata["Description-Content-Type"] == "text/markdown"
assert metadata.get_payload().strip() == Path("README.md").read_text().strip()
assert len(metadata["Keywords"].split(",")) > 5
urls = {url.split(",")[0] for url in metadata.get_all("Project-URL")}
assert urls == {"Homepage", "Documentation", "Repository", "Issues", "Changelog"}, urls
classifiers = metadata.get_all("Classifier")
for version in ("3.11", "3.12", "3.13", "3.14"):
    assert f"Programming Language :: Python :: {version}" in classifiers
assert "Typing :: Typed" in classifiers
needs = metadata.get_all("Requires-Dist")
assert {need for need in needs if "extra ==" not in need} == {
    "h5py",
    "keras>=3.12",
    "tensorflow>=2.18; python_version < '3.14'",
}, needs

with tarfile.open(sdist) as file:
    names = {name.partition("/")[2] for name in file.getnames()}
# Everything needed to build and test, and only tracked files.
assert {"pyproject.toml", "LICENSE", "tests/conftest.py"} <= names
assert names <= {*tracked, "PKG-INFO"}, names - {*tracked}
print(f"{wheel.name} and {sdist.name} are complete.")
