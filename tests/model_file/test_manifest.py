"""The manifest survives the round trip through strings, and invalid values are refused in one line."""

import json
from dataclasses import asdict, fields

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from toys import TOY_VOCABULARY, manifest_of, random_model

from smallm.errors import UserError
from smallm.model_file.manifest import FORMAT_VERSION, MAX_SAMPLING, Manifest
from smallm.model_file.sampling import Sampling

MANIFEST = manifest_of(random_model(), training={"text": "größe.txt 🎉", "val_loss": 1.25, "step": 3, "none": None})
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(), values, max_size=3),
    max_leaves=6,
)


def test_manifest_round_trip():
    metadata = MANIFEST.to_metadata()
    assert all(key.startswith("smallm.") and value.isascii() for key, value in metadata.items())
    assert {key.removeprefix("smallm."): json.loads(value) for key, value in metadata.items()} == asdict(MANIFEST)
    assert Manifest.from_metadata(metadata | {"other.tool": "{not json"}, "x") == MANIFEST
    assert Manifest.from_dict(json.loads(json.dumps(asdict(MANIFEST))), "x") == MANIFEST
    assert MANIFEST.vocabulary == TOY_VOCABULARY


def test_a_value_that_a_later_version_adds_is_no_mistake():
    assert Manifest.from_metadata(MANIFEST.to_metadata() | {"smallm.later": "1"}, "x") == MANIFEST
    sampling = json.dumps(MANIFEST.sampling | {"later": 1})
    assert Manifest.from_metadata(MANIFEST.to_metadata() | {"smallm.sampling": sampling}, "x").sampling["later"] == 1


@pytest.mark.parametrize("metadata", [{}, {"other.tool": "1"}, {"block_size": "16"}])
def test_metadata_of_other_projects(metadata):
    with pytest.raises(UserError, match=r"^x is not a smallm model; write one with: python -m smallm export$"):
        Manifest.from_metadata(metadata, "x")


@pytest.mark.parametrize("name", [f.name for f in fields(Manifest)])
def test_a_missing_value(name):
    values = {key: value for key, value in asdict(MANIFEST).items() if key != name}
    if name in ("sampling", "training", "precision", "quality", "window", "rope_theta", "checksum"):
        assert Manifest.from_dict(values, "x").block_size == 16
    else:
        with pytest.raises(UserError, match=r"^x has "):
            Manifest.from_dict(values, "x")


def read_or_refused(read):
    """The manifest that `read` gives; None if it is refused, in one line."""
    try:
        return read()
    except UserError as error:
        message = str(error)
    assert message.startswith("x has ")
    assert "\n" not in message
    assert len(message) < 300
    return None


@given(st.sampled_from([f.name for f in fields(Manifest)]), JSON)
@example("format_version", "\n" * 9999)
def test_any_value_is_refused_in_one_line_or_can_be_used(name, value):
    metadata = MANIFEST.to_metadata() | {f"smallm.{name}": json.dumps(value)}
    for read in (
        lambda: Manifest.from_dict(asdict(MANIFEST) | {name: value}, "x"),
        lambda: Manifest.from_metadata(metadata, "x"),
    ):
        if manifest := read_or_refused(read):
            sizes = ("block_size", "n_layer", "n_head", "n_kv_head", "n_embd", "head_dim")
            assert all(type(getattr(manifest, size)) is int and getattr(manifest, size) > 0 for size in sizes)
            assert manifest.vocabulary.size == manifest.vocab_size
            assert len(manifest.vocabulary.encode(manifest.start_text)) > 0
            assert manifest.format_version == FORMAT_VERSION


@given(
    st.dictionaries(
        st.sampled_from([f.name for f in fields(Sampling)]),
        st.integers(-1, 3) | st.floats() | st.booleans() | st.just(1 << 60),
    )
)
def test_sampling_defaults_are_valid_if_the_sampler_accepts_them(sampling):
    manifest = read_or_refused(lambda: Manifest.from_dict(asdict(MANIFEST) | {"sampling": sampling}, "x"))
    try:
        accepted = Sampling.resolve({}, sampling)
    except UserError:
        accepted = None
    if accepted and max(accepted.temperature, accepted.top_k) > MAX_SAMPLING:
        accepted = None
    assert (manifest is None) == (accepted is None) or any(type(value) is bool for value in sampling.values())


NONSENSE = [
    ("training", {"val_loss": "x"}), ("training", {"val_loss": True}), ("training", {"val_loss": 10**400}),
    ("training", {"text": 5}), ("training", {"characters": "many"}), ("training", {"parameters": 1.5}),
    ("training", {"step": -1}), ("quality", {"onnxruntime": 1.21}),
    ("precision", "<b>"), ("precision", "int8\n"), ("precision", ""), ("precision", "x" * 99),
    ("rope_theta", True), ("rope_theta", 10**400),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), NONSENSE)
def test_facts_that_a_page_or_a_message_could_not_show(name, value):
    assert read_or_refused(lambda: Manifest.from_dict(asdict(MANIFEST) | {name: value}, "x")) is None


@pytest.mark.parametrize("value", [None, 2, 1.25, float("nan")])
def test_facts_that_are_shown(value):
    training = {"val_loss": value, "text": None, "later": [1], "parameters": 1000}
    assert Manifest.from_dict(asdict(MANIFEST) | {"training": training}, "x").training is training


@given(st.sampled_from([f.name for f in fields(Manifest)]), st.text())
def test_any_string_in_the_metadata(name, text):
    read_or_refused(lambda: Manifest.from_metadata(MANIFEST.to_metadata() | {f"smallm.{name}": text}, "x"))


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_another_format_version_says_what_to_do(version):
    with pytest.raises(
        UserError, match=rf"^x has format version {version!r}; this smallm reads 1: export the model ag"
    ):
        Manifest.from_dict(asdict(MANIFEST) | {"format_version": version}, "x")
