"""benchmarks/compatibility.py: the table says what was found, and a false claim is noticed."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from smallm.errors import UserError
from smallm.language_model import MODEL_FILE

ROOT = Path(__file__).parents[2]


@pytest.fixture
def compatibility(monkeypatch):
    """The script, as a module."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import compatibility

    return compatibility


@pytest.fixture
def found(compatibility):
    """int8 from 1.23 on, and another greedy text of int4 in the middle."""
    yes, other, no = compatibility.Found(1.5, (1, 2)), compatibility.Found(1.25, (1, 3)), compatibility.Found(error="x")
    rows = {version: dict.fromkeys(compatibility.FILES, yes) for version in compatibility.VERSIONS}
    for version in ("1.21.0", "1.22.0"):
        rows[version]["int8"] = no
    rows["1.23.0"]["int4"] = other
    return rows


def test_the_table(compatibility, found):
    assert compatibility.table(found, found["newest"]).splitlines() == [
        "|  | fp32 | int8 | int4 | portable |",
        "| --- | --- | --- | --- | --- |",
        "| 1.21.0 | 1.5000 | no | 1.5000 | 1.5000 |",
        "| 1.22.0 | 1.5000 | no | 1.5000 | 1.5000 |",
        "| 1.23.0 | 1.5000 | 1.5000 | 1.2500 * | 1.5000 |",
        "| newest | 1.5000 | 1.5000 | 1.5000 | 1.5000 |",
    ]


def test_claims(compatibility, found):
    assert compatibility.wrong_claims(found) == []
    found["1.22.0"]["int8"] = found["1.22.0"]["fp32"]  # older than claimed is no fault
    assert compatibility.wrong_claims(found) == []
    found["newest"]["int8"] = found["1.21.0"]["fp32"] = compatibility.Found(error="x")
    assert compatibility.wrong_claims(found) == [
        "fp32: refused by 1.21.0; export.py says 1.21 or newer",
        "int8: refused by newest; export.py says 1.23 or newer",
    ]


def test_the_table_goes_between_its_marks(compatibility, tmp_path):
    readme = Path(shutil.copy(ROOT / "README.md", tmp_path))
    before = readme.read_text(encoding="utf-8")
    for lines in ("| a |", "| b |"):
        compatibility.write_table(readme, lines)
    after = readme.read_text(encoding="utf-8")
    assert f"{compatibility.BEGIN}\n| b |\n{compatibility.END}" in after
    for mark, side in ((compatibility.BEGIN, 0), (compatibility.END, 1)):
        assert before.split(mark)[side] == after.split(mark)[side]
    readme.write_text("no place")
    with pytest.raises(UserError, match="has no place for the table"):
        compatibility.write_table(readme, "| a |")


def test_a_probe_in_this_very_runtime(compatibility, exported, tmp_path):
    task = tmp_path / "task.json"
    task.write_text(json.dumps({"ids": list(b"the river sings to the moon"), "seed": list(b"the "), "new": 9}))
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{compatibility.PROBE}"
    command = [sys.executable, "-c", code, str(exported / MODEL_FILE), str(task)]
    answer = compatibility.answer(command, task)
    assert 0.5 < answer.bits < 4  # an untrained model has 8
    assert len(answer.written) == 9
    refused = compatibility.answer([*command[:3], str(exported / "smallm.json"), str(task)], task)
    assert refused.bits is None
    assert "UserError" in refused.error
