"""smallm.export.model_card: the card describes the folder and keeps the licence that its owner gave."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from toys import manifest_of, random_model

from smallm.cli import main as cli
from smallm.export.model_card import CARD_FILE, UNKNOWN_LICENCE, is_card, licence_of, model_card
from smallm.export.precision import Quality
from smallm.language_model import MODEL_FILE, LanguageModel

QUALITY = Quality("fp32", 500_000, 1.234, 99, 4321.0, "1.21")
TRAINING = {"text": "owls.txt", "characters": 20_000, "parameters": 115_712, "step": 60, "val_loss": 0.8553}


def card_of(sample: str = "an old owl\n", name: str = "owls", licence: str = "mit", sizes=(), **training) -> str:
    manifest = replace(manifest_of(random_model()), training=TRAINING | training, quality={"onnxruntime": "1.21"})
    return model_card(name, manifest, [QUALITY], {MODEL_FILE: 500_000} | dict(sizes), sample, licence)


def test_the_card_compares_the_model_with_baselines(exported):
    card = (exported / CARD_FILE).read_text(encoding="utf-8")
    section = card.split("## Compared with baselines")[1].split("\n## ")[0]
    for name in ("the model", "gzip", "bz2", "xz", "-gram"):
        assert re.search(rf"\| [0-9]*{name} \| \d\.\d{{4}} \|", section), name
    assert "## Compared" not in card_of()  # of a model without its run


def front_matter(card: str) -> dict:
    return yaml.safe_load(re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)[1])


def test_the_card_of_an_export(exported):
    card = (exported / CARD_FILE).read_text(encoding="utf-8")
    sidecar = json.loads((exported / "smallm.json").read_text(encoding="utf-8"))
    front = front_matter(card)
    assert (front["license"], front["pipeline_tag"], front["library_name"]) == (
        "unknown", "text-generation", "transformers",
    )  # fmt: skip
    training, quality = sidecar["training"], sidecar["quality"]
    for said in (
        "# tiny\n", "`owls.txt`", f"{training['characters']:,} characters", f"{training['val_loss']:.4f} nats",
        f"{training['parameters']:,}", f"{quality['bits_per_char']:.4f}", "ONNX Runtime 1.21 or newer", "| fp32 | ",
        "32 ids",
    ):  # fmt: skip
        assert said in card
    sample = re.search(r"```text\n(.*?)\n```", card, re.DOTALL)[1]
    written = "".join(LanguageModel.load(exported).stream(max_length=200, rng_seed=1))
    assert sample == "".join(c if c.isprintable() or c == "\n" else "�" for c in written).strip("\n")
    named = re.findall(r"^\| `(.*?)` \| ([\d,.]+) \|", card, re.MULTILINE)
    sizes = {name: float(size.replace(",", "")) for name, size in named}
    files = {file.relative_to(exported).as_posix(): file.stat().st_size for file in exported.rglob("*.*")}
    del files[CARD_FILE]
    assert sizes == {name: pytest.approx(size / 1000, abs=0.051) for name, size in files.items()}


def test_the_card_lists_only_existing_files():
    headings = ("transformers\n", "llama.cpp", "OpenVINO")
    for sizes, expected in (
        ({}, []),
        ({"model.safetensors": 9}, ["transformers\n"]),
        ({"owls.gguf": 9, "model.portable.onnx": 9}, ["llama.cpp", "OpenVINO"]),
    ):
        card = card_of(sizes=sizes)
        assert [heading for heading in headings if f"### {heading}" in card] == expected
        assert front_matter(card)["library_name"] == ("transformers" if "model.safetensors" in sizes else "onnx")
    assert 'Llama("owls.gguf"' in card


@pytest.mark.parametrize(
    "sample",
    ["", "\n\n", "```\nowls\n````\n", "\x1b[31mred\x07\x00", "<seed> <new> {x}", '"quoted" \\n', "中文 字\n"],
)
def test_samples_with_any_content(sample):
    card = card_of(sample)
    fence = re.search(r"## A sample\n\n(`{3,})text\n", card)[1]
    shown = card.split(f"{fence}text\n", 1)[1].split(f"\n{fence}\n", 1)[0]
    assert shown == sample.replace("\x1b", "�").replace("\x07", "�").replace("\x00", "�").strip("\n")
    assert "\x1b" not in card
    for code in re.findall(r"```python\n(.*?)```", card.split("## How to use the model")[1], re.DOTALL):
        compile(code, "card", "exec")


def test_names_with_line_breaks_stay_on_one_line():
    card = card_of(name="a\nb `c` # d", text="my|own`\n# text.txt")
    assert "# a b `c` # d\n" in card
    assert "| trained on | `my\\|own' # text.txt`, 20,000 characters |" in card


def test_unknown_figures_are_left_out():
    manifest = replace(manifest_of(random_model()), quality={"onnxruntime": "1.21"})
    quality = replace(QUALITY, bits_per_char=None, characters=0)
    card = model_card("owls", manifest, [quality], {MODEL_FILE: 9}, "an owl", UNKNOWN_LICENCE)
    assert "| fp32 | 0.50 | - | 4,321 | 1.21 or newer |" in card
    assert "None" not in card.replace("session.run(None, ", "")
    assert "trained on" not in card.split("## Precision")[0].split("## The model")[1]


# -- through the command


@pytest.fixture
def out(tiny_run, tmp_path) -> Path:
    assert export(tiny_run, tmp_path / "out") == 0
    return tmp_path / "out"


def export(run: Path, out: Path, *argv: str) -> int:
    return cli.run(cli.export, [str(run), "--out", str(out), *argv])


def test_the_licence_is_kept(tiny_run, out):
    file = out / CARD_FILE
    assert licence_of(file) == UNKNOWN_LICENCE
    text = file.read_text(encoding="utf-8")
    file.write_text(text.replace(UNKNOWN_LICENCE, "cc-by-4.0").replace("# tiny", "# Owls"), encoding="utf-8")
    assert export(tiny_run, out) == 0
    assert front_matter(file.read_text(encoding="utf-8"))["license"] == "cc-by-4.0"
    assert "# tiny\n" in file.read_text(encoding="utf-8")


def test_a_readme_of_the_user_is_not_lost(tiny_run, out, capsys):
    (out / CARD_FILE).write_text("# My owls\n\nlicense: mine\n", encoding="utf-8")
    assert not is_card(out / CARD_FILE)
    capsys.readouterr()
    assert export(tiny_run, out) == 2
    assert f"{out} also holds README.md, which would be lost" in capsys.readouterr().err
    assert (out / CARD_FILE).read_text(encoding="utf-8").startswith("# My owls")


def test_a_foreign_file_in_the_onnx_folder_is_not_lost(tiny_run, out, capsys):
    (out / "onnx" / "notes.txt").write_text("mine")
    assert export(tiny_run, out) == 2
    assert f"{out} also holds onnx/notes.txt, which would be lost" in capsys.readouterr().err


def test_the_model_is_stored_once(out):
    assert (out / "onnx" / "model.onnx").samefile(out / MODEL_FILE)


def test_the_model_is_copied_where_links_are_not_possible(tiny_run, tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("os.link", refuse)
    assert export(tiny_run, tmp_path / "out") == 0
    assert (tmp_path / "out" / "onnx" / "model.onnx").read_bytes() == (tmp_path / "out" / MODEL_FILE).read_bytes()


def test_an_int8_card_states_the_loss_and_the_folder_has_no_fp32_weights(tiny_run, tmp_path):
    assert export(tiny_run, tmp_path / "out", "--precision", "int8", "--allow-loss") == 0
    card = (tmp_path / "out" / CARD_FILE).read_text(encoding="utf-8")
    assert "It needs ONNX Runtime 1.23 or newer" in card
    assert re.findall(r"^\| (fp32|int8) \|", card, re.MULTILINE) == ["fp32", "int8"]
    assert "`onnx/model_int8.onnx`" in card
    assert not (tmp_path / "out" / "model.safetensors").exists()
