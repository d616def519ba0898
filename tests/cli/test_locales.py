"""All commands under the old encodings of Windows consoles and of LC_ALL=C, with names and texts in several scripts."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = "Zoë sagte: «Ænima» — 吾輩は猫である。Говорили, что 🦉 schläft.\n"
TOY = ["--model.n_layer=1", "--model.n_head=1", "--model.n_embd=32", "--model.block_size=16", "--train.max_steps=3",
       "--train.eval_every=2", "--data.min_count=1"]  # fmt: skip
LOCALES = {  # in the second one Python cannot decode names that are not ASCII
    "a Windows console": ({"PYTHONUTF8": "0", "PYTHONIOENCODING": "cp1252"}, "Zoës 猫"),
    "LC_ALL=C": ({"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}, "Zoe's cat"),
}


@pytest.mark.slow
@pytest.mark.parametrize("locale", LOCALES)
def test_all_commands_work(tmp_path, locale):
    variables, name = LOCALES[locale]
    folder, text, run = tmp_path / f"{name} and dogs", f"{name}.txt", f"runs/{name}"
    folder.mkdir()
    (folder / text).write_text(TEXT * 60, encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | variables

    def smallm(*argv):
        command = [sys.executable, "-X", "warn_default_encoding", "-m", "smallm", *argv]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True)
        said = done.stderr.decode(errors="replace")
        assert done.returncode == 0, said[-2000:]
        assert "Traceback" not in said
        assert not re.search(r"smallm/(?!.*site-packages).*EncodingWarning", said), said
        return done.stdout

    smallm("train", "--check", text)
    smallm("train", "--data", text, "--out", run, f"--sample.seed={name}", *TOY)
    smallm("train", "--resume", run, "--train.max_steps=5")
    smallm("export", run)
    written = smallm("infer", "--model", run, "--seed", name, "--max-length", "9", "--rng-seed", "1")
    assert written.decode().startswith(name)
    assert b"nats per character" in smallm("infer", "--model", run, "--perplexity", text)
    smallm("infer", "--model", run, "--surprise", text, "--html", f"{name}.html")
    assert "猫" in (folder / f"{name}.html").read_text(encoding="utf-8")
    assert b"finished" in smallm("runs")
    smallm("show", run)
    smallm("plot", run, "--html", f"{run}/report-{name}.html")
