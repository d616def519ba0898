"""Files from strangers: damaged and hostile ones end in success or in one line, and cost neither memory nor time.

benchmarks/fuzz_files.py does the same with thousands of cases a format, in processes that may crash.
"""

import json
import random
import shutil
import struct
import time
import tracemalloc
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import load_file, save_file
from toys import manifest_of, random_model, save_onnx

from smallm import LanguageModel, UserError
from smallm.cli import main as cli
from smallm.export.folder import export_checkpoint
from smallm.export.graph import build_graph
from smallm.export.portable_graph import build_portable
from smallm.generation.sequence_state import match_stops
from smallm.model_file.onnx_reader import MODEL, OPERATORS, fields, packed, read_message, read_onnx
from smallm.runs.state_file import read_json
from smallm.training.checkpoint.manager import best_checkpoint
from smallm.training.checkpoint.qwen3 import to_qwen3, weight_shapes
from smallm.training.checkpoint.safe_load import check_fits
from smallm.training.config import Config, ModelConfig, check_types
from smallm.training.model.transformer import TransformerLanguageModel

CASES = {
    "onnx": 120, "export folder": 40, "prompts": 40, "text": 24, "toml": 20, "tokenizer.json": 24,
    "training_state.json": 16, "model.safetensors": 20, "optimizer.safetensors": 10,
}  # fmt: skip
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.just("n_layer"), values),
    max_leaves=4,
)


@pytest.fixture(scope="module")
def fuzz():
    """The benchmark, as a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
        import fuzz_files

        yield fuzz_files


@pytest.fixture(scope="module")
def home(fuzz, tmp_path_factory):
    """The valid files that the mutations begin with."""
    home = fuzz.Home(tmp_path_factory.mktemp("home"))
    fuzz.make_home(home)
    return home


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Path:
    """A model of random weights."""
    return save_onnx(random_model(), tmp_path_factory.mktemp("toy") / "toy.onnx")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of codecs that Python has thought better of
@pytest.mark.parametrize("name", CASES)
def test_mutated_files_end_in_success_or_in_one_line(fuzz, home, tmp_path, name):
    kinds = set()
    for number in range(CASES[name]):
        outcome = fuzz.perform(name, number, 0, home, tmp_path / "case")
        assert outcome["kind"] in fuzz.GOOD, (number, outcome)
        assert outcome["seconds"] < 20
        kinds.add(outcome["kind"])
    assert "refused" in kinds


def test_the_fuzzer_recognises_bad_exits(fuzz):
    line = "smallm: x is broken; do y\n"
    assert fuzz.verdict(0, "all is well\n")["kind"] == "success"
    assert fuzz.verdict(2, f"warning: of something\n{line}")["kind"] == "refused"
    assert fuzz.verdict(2, "smallm: not enough memory\n")["kind"] == "memory"
    bad = [("Traceback (most recent call last):", line), (2, line * 2), (2, f"{line}more\n"), (2, ""), (1, line),
           (0, "x.py:1: RuntimeWarning: overflow\n"), (-11, ""), (None, line)]  # fmt: skip
    for code, said in bad:
        assert fuzz.verdict(code, said)["kind"] not in fuzz.GOOD, (code, said)


def test_the_fuzzer_keeps_the_files_of_a_finding(fuzz, tmp_path):
    (tmp_path / "case-3").mkdir()
    row = fuzz.Row("onnx")
    fuzz.record(row, 3, {"kind": "crash", "message": "exit code -11"}, tmp_path, tmp_path / "keep")
    assert row.findings == [{"number": 3, "kind": "crash", "message": "exit code -11"}]
    assert (tmp_path / "keep" / "onnx-3").is_dir()


# ONNX: what a file may hold.


def edited(source: Path, target: Path, edit) -> Path:
    proto = onnx.load(source)
    edit(proto)
    target.write_bytes(proto.SerializeToString())
    return target


def largest(proto) -> onnx.TensorProto:
    return max(proto.graph.initializer, key=lambda tensor: len(tensor.raw_data))


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        LanguageModel.load(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    assert len(message) < len(str(path)) + 300
    return message.replace(str(path), "")


@pytest.mark.parametrize("location", ["weights.bin", "../../../../etc/passwd", "/etc/passwd", "/dev/zero", "", "a\nb"])
@pytest.mark.parametrize("place", ["initializer", "attribute"])
def test_data_in_other_files_are_refused(toy, tmp_path, location, place):
    def move(proto):
        tensor = largest(proto)
        (tmp_path / "weights.bin").write_bytes(tensor.raw_data)
        tensor.data_location = TensorProto.EXTERNAL
        tensor.ClearField("raw_data")
        tensor.external_data.add(key="location", value=location)
        if place == "attribute":
            proto.graph.node.insert(0, helper.make_node("ConstantOfShape", ["shape"], [tensor.name], value=tensor))
            proto.graph.initializer.remove(tensor)

    assert "is stored in another file" in refusal(edited(toy, tmp_path / "model.onnx", move))


def test_only_the_mark_of_data_elsewhere_is_refused_too(toy, tmp_path):
    def mark(proto):
        largest(proto).data_location = TensorProto.EXTERNAL

    assert "is stored in another file" in refusal(edited(toy, tmp_path / "model.onnx", mark))


@pytest.mark.parametrize(
    ("kind", "domain"),
    [("Loop", ""), ("If", ""), ("Scan", ""), ("Conv", ""), ("RandomNormal", ""), ("", ""), ("MatMul", "evil"),
     ("Loop\n", "com.microsoft"), ("x" * 100_000, "")],
)  # fmt: skip
def test_operators_that_are_not_on_the_list(toy, tmp_path, kind, domain):
    def change(proto):
        proto.graph.node[3].op_type, proto.graph.node[3].domain = kind, domain

    assert "it uses the operator" in refusal(edited(toy, tmp_path / "model.onnx", change))


def test_the_list_holds_the_operators_of_real_exports(tiny_run, tmp_path):
    emitted = set()
    for precision in ("fp32", "int8", "int4"):
        export_checkpoint(best_checkpoint(tiny_run), tmp_path / precision, precision, allow_loss=True, portable=True)
        for file in (tmp_path / precision).glob("*.onnx"):
            emitted |= {node.op_type for node in onnx.load(file).graph.node}
    windowed = random_model(window=8)
    for build in (build_graph, build_portable):
        emitted |= {node.op_type for node in build(windowed, manifest_of(windowed)).graph.node}
    assert emitted == OPERATORS - {"ArgMax", "Neg"}  # which earlier versions exported


EMPTY_PARTS = {
    "nodes": (b"\x3a", b"\x0a\0"), "initializers": (b"\x3a", b"\x2a\0"), "inputs": (b"\x3a", b"\x5a\0"),
    "inputs of a node": (b"\x3a\x0a", b"\x0a\0"), "metadata": (b"", b"\x72\0"),
}  # fmt: skip


@pytest.mark.parametrize("part", EMPTY_PARTS)
def test_empty_parts_are_counted_while_they_are_parsed(tmp_path, part):
    keys, empty = EMPTY_PARTS[part]
    data = empty * 10_000_000
    for key in reversed(keys):
        data = bytes([key]) + varint(len(data)) + data
    (tmp_path / "model.onnx").write_bytes(data)
    del data
    tracemalloc.start()
    limit = "20,000 nodes" if part == "nodes" else "150,000 parts"
    assert f"it has more than {limit}" in refusal(tmp_path / "model.onnx")
    assert tracemalloc.get_traced_memory()[1] < 32 << 20
    tracemalloc.stop()


def test_the_list_has_no_control_flow_and_no_chance():
    chance = {"RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Multinomial", "Bernoulli"}
    assert not OPERATORS & {"If", "Loop", "Scan", "SequenceMap", *chance}


def with_body(proto):
    proto.graph.node[0].attribute.append(helper.make_attribute("body", helper.make_graph([], "g", [], [])))


def with_function(proto):
    proto.functions.append(helper.make_function("d", "f", [], [], [], []))


def with_sparse(proto):
    proto.graph.sparse_initializer.add().dims.append(1 << 40)


@pytest.mark.parametrize("edit", [with_body, with_function, with_sparse])
def test_parts_that_smallm_never_writes(toy, tmp_path, edit):
    assert "an unknown field" in refusal(edited(toy, tmp_path / "model.onnx", edit))


@pytest.mark.parametrize("dims", [[], [1], [1 << 40], [-1, -1], [1 << 62, 4], [0, 1 << 62], [3] * 9])
def test_shapes_that_the_data_do_not_fill(toy, tmp_path, dims):
    def change(proto):
        largest(proto).dims[:] = dims

    assert "shape" in refusal(edited(toy, tmp_path / "model.onnx", change))


@pytest.mark.parametrize("kind", [0, TensorProto.STRING, TensorProto.DOUBLE, 999])
def test_types_that_the_data_do_not_fill(toy, tmp_path, kind):
    def change(proto):
        largest(proto).data_type = kind

    assert "shape" in refusal(edited(toy, tmp_path / "model.onnx", change))


def metadata(proto, **values):
    kept = {p.key: p.value for p in proto.metadata_props}
    helper.set_model_props(proto, kept | {f"smallm.{key}": value for key, value in values.items()})


@pytest.mark.parametrize(
    "values",
    [{"block_size": "1" * 5000}, {"block_size": "16777215"}, {"n_embd": "16777215"}, {"vocab_size": "262.0"},
     {"sampling": '{"temperature": 1' + "0" * 400 + "}"}, {"sampling": '{"top_k": 1' + "0" * 30 + "}"},
     {"block_size": "[" * 100_000}],
)  # fmt: skip
def test_metadata_out_of_range(toy, tmp_path, values):
    assert "metadata" in refusal(edited(toy, tmp_path / "model.onnx", partial(metadata, **values)))


def test_a_key_twice(toy, tmp_path):
    def double(proto):
        proto.metadata_props.append(proto.metadata_props[0])

    assert "twice" in refusal(edited(toy, tmp_path / "model.onnx", double))


@pytest.fixture(scope="module")
def sealed(toy, tmp_path_factory) -> Path:
    """The toy with its checksum."""
    edit = partial(metadata, checksum=str(read_onnx(toy).checksum))
    return edited(toy, tmp_path_factory.mktemp("sealed") / "model.onnx", edit)


@pytest.mark.parametrize("part", ["weight", "name"])
def test_one_changed_bit_is_found(toy, sealed, tmp_path, part):
    texts = {LanguageModel.load(file).generate("a", 9, rng_seed=1) for file in (toy, sealed)}
    assert len(texts) == 1
    data = bytearray(sealed.read_bytes())
    wanted = largest(onnx.load(sealed)).raw_data if part == "weight" else b"smallm\x2a"
    data[data.index(wanted) + 3] ^= 1
    (tmp_path / "model.onnx").write_bytes(data)
    assert "is damaged: it does not match its checksum" in refusal(tmp_path / "model.onnx")


def test_a_file_that_is_replaced_after_the_check_is_not_opened_again(toy, tmp_path, monkeypatch):
    monkeypatch.setattr("smallm.inference.session.default_threads", lambda bytes=0: 1 if bytes else 2)
    path = Path(shutil.copy(toy, tmp_path / "model.onnx"))
    expected = LanguageModel.load(path).perplexity("some text")
    lm = LanguageModel.load(path)
    path.write_bytes(b"replaced")
    assert lm.perplexity("some text") == expected
    lm.close()
    with pytest.raises(UserError, match="was closed"):
        lm.perplexity("some text")


@pytest.mark.parametrize("begin", [b"", b"\x3a\x80\x80\x80\x80\x08"], ids=["zeros", "a graph of zeros"])
def test_a_file_of_gigabytes_is_not_read_into_memory(tmp_path, begin):
    with (tmp_path / "model.onnx").open("wb") as file:
        file.write(begin)
        file.truncate(len(begin) + (2 << 30))  # a hole, which takes no room on the disk
    tracemalloc.start()
    assert "truncated or not an ONNX model" in refusal(tmp_path / "model.onnx")
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_a_cache_that_the_file_does_not_explain(toy, tmp_path):
    """Inputs, outputs and metadata agree on a width that would take gigabytes."""

    def widen(proto):
        for value in [*proto.graph.input, *proto.graph.output]:
            if "." in value.name:
                value.type.tensor_type.shape.dim[1].dim_value = 1 << 20
        metadata(proto, n_head=str(1 << 20), n_kv_head=str(1 << 20))

    assert "too small for the sizes" in refusal(edited(toy, tmp_path / "model.onnx", widen))


def test_two_models_in_one_file(toy, tmp_path):
    """Protobuf would merge them: what was checked would not be what is run."""
    (tmp_path / "model.onnx").write_bytes(toy.read_bytes() * 2)
    assert "a second" in refusal(tmp_path / "model.onnx")


def test_a_varint_that_never_ends_is_refused_quickly(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"\x80" * 20_000_000)
    begun = time.process_time()
    assert "truncated or not an ONNX model" in refusal(tmp_path / "model.onnx")
    assert time.process_time() - begun < 2


def test_the_file_name_does_not_select_the_parser(toy, tmp_path):
    path = Path(shutil.copy(toy, tmp_path / "model.ort"))
    texts = [LanguageModel.load(file).generate("a", 5, temperature=0) for file in (path, toy)]
    assert texts[0] == texts[1]


def test_an_input_that_onnx_runtime_takes_for_a_constant(toy, tmp_path):
    """Before version 4 of the format, an input with a default was no input."""

    def age(proto):
        proto.ir_version = 3

    lm = LanguageModel.load(edited(toy, tmp_path / "model.onnx", age))
    with pytest.raises(UserError, match="is broken, export the model again"):
        lm.generate("a", 3)


def test_logits_of_another_shape(toy, tmp_path):
    def cut(proto):
        (start,) = (t for t in proto.graph.initializer if t.name == "num_logits_to_keep")
        start.CopyFrom(numpy_helper.from_array(np.array(1), start.name))

    lm = LanguageModel.load(edited(toy, tmp_path / "model.onnx", cut))
    with pytest.raises(UserError, match="is broken, export the model again"):
        lm.perplexity("some text")


def test_what_is_read_is_what_onnx_reads(toy):
    proto, file = onnx.load(toy), read_onnx(toy)
    assert file.metadata == {p.key: p.value for p in proto.metadata_props}
    values = {}
    for value in [*proto.graph.input, *proto.graph.output]:
        kind = value.type.tensor_type
        values[value.name] = (kind.elem_type, [d.dim_value for d in kind.shape.dim if d.HasField("dim_value")])
    assert file.values == values
    assert file.data == toy.read_bytes()
    found = read_message(memoryview(toy.read_bytes()), MODEL)
    assert [n["op_type"] for n in found["graph"]["node"]] == [n.op_type for n in proto.graph.node]
    assert [t["dims"] for t in found["graph"]["initializer"]] == [list(t.dims) for t in proto.graph.initializer]
    assert [a["ints"] for n in found["graph"]["node"] for a in n["attribute"]] == [
        list(a.ints) for n in proto.graph.node for a in n.attribute]  # fmt: skip


def test_a_check_costs_little(tmp_path):
    path = save_onnx(random_model(n_layer=4, n_embd=128, n_head=4, n_kv_head=4), tmp_path / "model.onnx")
    assert path.stat().st_size > 3_000_000
    times = []
    for _ in range(10):
        begun = time.process_time()
        read_onnx(path)
        times.append(time.process_time() - begun)
    assert min(times) < 0.02  # 0.003 on a quiet machine


def varint(number: int) -> bytes:
    number &= (1 << 64) - 1
    out = b""
    while number >= 0x80:
        out, number = out + bytes([number & 0x7F | 0x80]), number >> 7
    return out + bytes([number])


FIELD = st.tuples(st.integers(0, 2000), st.one_of(st.integers(0, (1 << 64) - 1), st.binary(max_size=300)))


@given(st.lists(FIELD, max_size=6))
def test_fields_come_back(row):
    data = b""
    for number, value in row:
        is_number = isinstance(value, int)
        body = varint(value) if is_number else varint(len(value)) + value
        data += varint(number << 3 | (0 if is_number else 2)) + body
    found = [(number, value if wire == 0 else bytes(value)) for number, wire, value in fields(memoryview(data))]
    assert found == row


@given(st.lists(st.integers(-(1 << 63), (1 << 63) - 1)))
def test_packed_numbers_come_back(numbers):
    assert packed(memoryview(b"".join(map(varint, numbers)))) == numbers


@given(st.binary(max_size=60))
@example(b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\x7f")
@example(b"\x3a\x04\x0a\x7f\x00\x00")
@example(b"\x08" + b"\xff" * 10 + b"\x01")
def test_any_bytes_are_a_message_or_a_value_error(data):
    with suppress(ValueError):
        assert isinstance(read_message(memoryview(data), MODEL), dict)


# Seeds, stop strings and numbers of any length.


def test_seeds_and_stops_of_ten_million_characters(toy):
    lm, begun = LanguageModel.load(toy), time.process_time()
    long = "aé" * 5_000_000
    text = lm.generate(long, 20, rng_seed=1, stop=[long, "b" * 10_000_000])
    assert text[len(long) :] == lm.generate(long[-lm.block_size :], 20, rng_seed=1)[lm.block_size :]
    assert lm.next_characters(long) == lm.next_characters(long[-lm.block_size :])
    assert time.process_time() - begun < 10


def test_a_stop_that_almost_comes_is_found_in_linear_time():
    begun = time.process_time()
    stops, tail, lengths = ["a" * 10_000 + "b"], "", []
    for character in "a" * 15_000 + "b":
        lengths.append(match_stops(stops, tail + character))
        tail = (tail + character)[-lengths[-1][1] :]
    assert lengths[14_999] == (0, 10_000)
    assert lengths[15_000] == (10_001, 10_001)
    assert time.process_time() - begun < 5


def test_numbers_that_are_too_large(toy, capsys):
    lm = LanguageModel.load(toy)
    assert next(lm.stream("a", 10**30, rng_seed=1))
    argv = ["--model", str(toy), "--max-length", "3", "--rng-seed", "1"]
    for option in ("--threads", "--rng-seed", "--num-samples=-1", "--top-p"):
        assert cli.run(cli.infer, [*argv, option, "9" * 400] if "=" not in option else [*argv, option]) == 2
        assert capsys.readouterr().err.count("\n") == 1


# Checkpoints and configs.

SMALL = ModelConfig(n_layer=2, n_head=4, n_kv_head=2, n_embd=64, n_inner=96, block_size=24)


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("weights") / "model.safetensors"
    save_file(to_qwen3(TransformerLanguageModel(300, SMALL).state_dict(), SMALL), file)
    return file


@pytest.mark.parametrize("config", [SMALL, replace(SMALL, n_kv_head=0, n_inner=0, n_layer=1)])
def test_weight_shapes_are_those_of_the_model(config):
    tensors = to_qwen3(TransformerLanguageModel(300, config).state_dict(), config)
    assert weight_shapes(config, 300) == {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def test_weights_that_fit(weights):
    check_fits(weights, SMALL, 300)


@pytest.mark.parametrize(
    ("config", "vocab_size"),
    [
        (replace(SMALL, n_embd=1 << 20, n_head=1 << 14), 300), (replace(SMALL, n_inner=1 << 23), 300),
        (replace(SMALL, n_layer=900), 300), (replace(SMALL, n_layer=1), 300), (replace(SMALL, block_size=1 << 23), 300),
        (replace(SMALL, n_kv_head=4), 300), (SMALL, 301), (SMALL, 1 << 30),
    ],
)  # fmt: skip
def test_a_config_that_the_weights_do_not_fill(weights, config, vocab_size):
    with pytest.raises(UserError, match=r"^\S+/model.safetensors does not match its config: [^\n]*$"):
        check_fits(weights, config, vocab_size)


def test_a_model_of_terabytes_is_refused_before_it_is_built(refused, text_file):
    begun = time.process_time()
    message = refused("--data", str(text_file), "--model.n_embd", "1048576", "--model.n_head", "16384")
    assert "memory" in message
    assert "smaller model.n_embd" in message
    assert time.process_time() - begun < 10


def test_integer_weights(weights, tmp_path):
    file = tmp_path / "model.safetensors"
    save_file({name: tensor.int() for name, tensor in load_file(weights).items()}, file)
    with pytest.raises(UserError, match="must be floating-point"):
        check_fits(file, SMALL, 300)


@pytest.mark.parametrize(
    "content", [b"", b"\x00" * 8, struct.pack("<Q", 1 << 62), struct.pack("<Q", 2) + b"{}x", b"PK\x03\x04"]
)
def test_files_that_are_not_safetensors(tmp_path, content):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=r"truncated or not a safetensors file|does not match"):
        check_fits(tmp_path / "model.safetensors", SMALL, 300)


def test_a_header_with_many_tensors_is_not_parsed(tmp_path):
    tensors = ",".join(f'"{i}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for i in range(80_000))
    header = f"{{{tensors}}}".encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    begun = time.process_time()
    with pytest.raises(UserError, match=r"its header is larger than 4 MB"):
        check_fits(tmp_path / "model.safetensors", SMALL, 300)
    assert time.process_time() - begun < 0.2


def test_a_json_file_of_many_elements_is_not_parsed(tmp_path):
    (tmp_path / "tokenizer.json").write_text(f'{{"a": [{"[]," * 3_000_000}[]]}}')
    tracemalloc.start()
    with pytest.raises(ValueError, match="larger than 8 MB"):
        read_json(tmp_path / "tokenizer.json")
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


NESTED, HUGE = '{"a": ' + "[" * 400 + "]" * 400 + "}", '{"a": ' + "9" * 5000 + "}"


@pytest.mark.parametrize("text", ["", "[]", "3", "{", '{"a":' * 100_000, NESTED, HUGE, r'{"a": "\ud800"}'])
def test_json_that_is_too_large_or_not_an_object(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match=r".") as caught:
        read_json(tmp_path / "x.json")
    assert not isinstance(caught.value, UserError)


def test_valid_json(tmp_path):
    (tmp_path / "x.json").write_text(json.dumps(Config().to_dict()))
    assert read_json(tmp_path / "x.json") == Config().to_dict()


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [
        ("model", "n_layer", 2.0), ("model", "n_layer", True), ("model", "n_layer", "2"), ("model", "n_layer", None),
        ("model", "n_embd", 10**30), ("model", "n_layer", 1000), ("model", "block_size", 1 << 24),
        ("train", "seed", [1]),
        ("model", "rope_theta", float("inf")), ("model", "rope_theta", 10**400), ("train", "epochs", float("nan")),
        ("optim", "betas", [0.9]), ("optim", "betas", ["a", "b"]), ("optim", "betas", 0.9), ("optim", "name", []),
        ("train", "short_windows", [1.5]), ("data", "source", 3), ("sample", "seed", {"a": 1}),
        ("sample", "seed", "\udcff"), ("train", "sample_length", 1 << 32),
    ],
)  # fmt: skip
def test_settings_of_another_type_or_size(section, name, value):
    if isinstance(value, dict):
        expected = "unknown setting"
    else:
        expected = rf"^{section}\.{name} = [^\n]* must be "
    with pytest.raises(UserError, match=expected):
        Config.from_dict({section: {name: value}})


SETTINGS = [(section, name) for section, values in Config().to_dict().items() for name in values]


@settings(max_examples=40)
@given(st.sampled_from(SETTINGS), VALUES)
def test_any_value_of_a_setting_is_refused_or_can_be_used(setting, value):
    section, name = setting
    try:
        config = Config.from_dict({section: {name: value}})
    except UserError:
        return
    for values in (config.data, config.model, config.optim, config.train, config.sample):
        check_types(values)
    json.dumps(asdict(config), allow_nan=False)


def test_mutations_are_determined_by_their_seed(fuzz, home, tmp_path):
    def case(folder):
        folder.mkdir()
        argv = fuzz.FORMATS["onnx"](home, folder, random.Random("5"))[1]
        return (folder / "model.onnx").read_bytes(), argv[2:]

    assert case(tmp_path / "a") == case(tmp_path / "b")


def test_surrogates_are_refused(tmp_path):
    """JSON can spell them, but they could not be written again."""
    file = tmp_path / "state.json"
    file.write_text('{"start_text": "\\ud800"}')
    with pytest.raises(ValueError, match="surrogates"):
        read_json(file)
    file.write_text('{"start_text": "\\ud83c\\udf89"}')
    assert read_json(file) == {"start_text": "🎉"}


@pytest.mark.parametrize("encoding", ["idna", "utf-16"])
def test_encodings_without_an_error_handler(tmp_path, capsys, encoding):
    text = tmp_path / "text.txt"
    text.write_bytes("ein Text\n".encode("utf-16") + b"\x00\xd8" if encoding == "utf-16" else b"a.\xff\n" * 50)
    argv = ["--data", str(text), "--encoding", encoding, "--out", str(tmp_path / "run")]
    assert cli.run(cli.train, argv) == 2
    said = capsys.readouterr().err
    assert said.startswith("smallm: ")
    assert said.count("\n") == 1
