"""The examples in docstrings are run, in a folder of their own; none is skipped."""

from __future__ import annotations

import doctest
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HOUSE = ROOT / "grokcurv"
FILES = sorted(path.relative_to(ROOT) for path in HOUSE.rglob("*.py") if ">>>" in path.read_text())
NEEDED = {"lightning.py": "lightning", "huggingface.py": "transformers"}


@pytest.mark.parametrize("file", FILES, ids=str)
def test_examples(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where they write
    if file.name in NEEDED:
        pytest.importorskip(NEEDED[file.name])
    module = import_module(".".join(file.with_suffix("").parts).removesuffix(".__init__"))
    found = doctest.testmod(module)
    assert found.failed == 0
    assert found.attempted > 0


def test_no_example_is_skipped() -> None:
    files = [*HOUSE.rglob("*.py"), *(ROOT / "docs").rglob("*.md")]
    assert len(files) > len(FILES)
    assert [path for path in files if "+SKIP" in path.read_text()] == []
