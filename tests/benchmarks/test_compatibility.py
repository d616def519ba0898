"""benchmarks/compatibility.py: the table, and the check of the versions that export.py states."""

import json
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
    """Results where int8 needs 1.23, and int4 writes another greedy text in one version."""
    yes, other, no = (
        compatibility.Result(1.5, (1, 2)),
        compatibility.Result(1.25, (1, 3)),
        compatibility.Result(error="x"),
    )
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
    found["1.22.0"]["int8"] = found["1.22.0"]["fp32"]  # an older version than stated may open the file
    assert compatibility.wrong_claims(found) == []
    found["newest"]["int8"] = found["1.21.0"]["fp32"] = compatibility.Result(error="x")
    assert compatibility.wrong_claims(found) == [
        "fp32: refused by 1.21.0; export.py states 1.21 or newer",
        "int8: refused by newest; export.py states 1.23 or newer",
    ]


def test_the_table_is_written_between_the_markers(compatibility, tmp_path):
    page = tmp_path / "export.md"
    page.write_text(f"# Export\n{compatibility.BEGIN}\n| old |\n{compatibility.END}\nMore text.\n")
    before = page.read_text(encoding="utf-8")
    for lines in ("| a |", "| b |"):
        compatibility.write_table(page, lines)
    after = page.read_text(encoding="utf-8")
    assert f"{compatibility.BEGIN}\n| b |\n{compatibility.END}" in after
    for marker, side in ((compatibility.BEGIN, 0), (compatibility.END, 1)):
        assert before.split(marker)[side] == after.split(marker)[side]
    page.write_text("no markers")
    with pytest.raises(UserError, match="has no markers for the table"):
        compatibility.write_table(page, "| a |")


def test_a_probe_in_the_installed_runtime(compatibility, exported, tmp_path):
    task = tmp_path / "task.json"
    task.write_text(json.dumps({"ids": list(b"the river sings to the moon"), "seed": list(b"the "), "new": 9}))
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{compatibility.PROBE}"
    command = [sys.executable, "-c", code, str(exported / MODEL_FILE), str(task)]
    answer = compatibility.probe(command, task)
    assert 0.5 < answer.bits < 4  # an untrained model has 8
    assert len(answer.written) == 9
    refused = compatibility.probe([*command[:3], str(exported / "smallm.json"), str(task)], task)
    assert refused.bits is None
    assert "UserError" in refused.error
