"""Damaged and hostile versions of the files that smallm reads, each a function of its random generator.

There are two kinds of edits: bytes, without knowledge of the format, and values of the format (a number in JSON, a
dimension or an operator in ONNX, a header in safetensors), which pass the first checks of a reader. This is a module
of fuzz_files.py, fuzz_c.py and the tests, not a script.
"""

import json
import math
import random
import re
import struct
from collections.abc import Iterator
from contextlib import suppress

import onnx
from onnx import TensorProto, helper

NUMBERS = [0, 1, -1, 2, 3, 7, 16, 17, 255, 256, 4096, 65_536, 10**6,
           2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, -(2**63)]  # fmt: skip
AFFORDABLE = [n for n in NUMBERS if not 256 < n < 1 << 31]  # values for a config that do not take minutes
VALUES = [*NUMBERS, 10**30, -0.0, 0.5, 1e-300, 1e308, float("nan"), float("inf"), float("-inf"), True, False, None, "",
          "x", "16", "../../../../etc/passwd", "/etc/passwd", "\x00", "\x1b[2J\n", "\ud800", "é" * 40, "a" * 100_000,
          [], {}, [[]], [0], {"a": 1}]  # fmt: skip
RAW = ["9" * 400, "9" * 5000, "1e999", "[" * 50_000, '{"a":' * 5000, "[" * 500 + "]" * 500, "-", "tru", '"\\ud83d"']
LOCATIONS = ["../../../../etc/passwd", "/etc/passwd", "/dev/zero", "weights.bin", "", "\x00"]
PLACE = "@@place@@"
OPERATORS = ["Loop", "If", "Scan", "Conv", "RandomNormal", "Expand", "Tile", "ConstantOfShape", "Range", "Concat",
             "Add", "MatMul", "Gemm", "Gather", "Reshape", "Identity", "CumSum", "TopK", "ScatterND", "Einsum",
             ""]  # fmt: skip


def bytewise(data: bytes, rng: random.Random) -> bytes:
    """The data with one to three edits of bytes."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        at, other = rng.randrange(len(data) + 1), rng.randrange(len(data) + 1)
        size = min(rng.choice((1, 1, 2, 4, 8, 64, 1000)), len(data) - at)
        before, old, after = data[:at], data[at : at + size], data[at + size :]
        piece = data[other : other + rng.choice((1, 4, 16, 256, 4096))]
        number = struct.pack("<Q", rng.choice(NUMBERS) & (1 << 64) - 1)[: rng.choice((1, 2, 4, 8))]
        middle = rng.choice((
            bytes(b ^ 1 << rng.randrange(8) for b in old), rng.randbytes(size), b"", number, piece, piece + old,
            rng.choice((b"\x00", b"\xff", b"\x80", b"\x7f")) * size, rng.randbytes(rng.choice((1, 8, 100))) + old,
        ))  # fmt: skip
        data = rng.choice((*[before + middle + after] * 8, before, data * 2))
    return data


def json_text(content: object, rng: random.Random, edits: int = 0) -> str:
    """The content as JSON with one to three edits of values; some results are not valid JSON.

    edits: the number of edits; 0 chooses at random.
    """
    content = json.loads(json.dumps(content))
    raw = ""
    for _ in range(edits or rng.choice((1, 1, 2, 3))):
        places = list(_places(content))
        if not places:
            break
        # Choosing the depth first keeps wide tables such as a vocabulary from getting all edits.
        depth = rng.choice(sorted({place[0] for place in places}))
        _, parent, key = rng.choice([place for place in places if place[0] == depth])
        kind = rng.randrange(8)
        if kind < 4:
            parent[key] = _near(parent[key], rng) if rng.random() < 0.4 else rng.choice(VALUES)
        elif kind == 4:
            raw, parent[key] = rng.choice(RAW), PLACE
        elif kind == 5:
            del parent[key]
        elif isinstance(parent, dict):
            value = parent[key] if kind == 6 else parent.pop(key)
            parent[rng.choice((f"{key}_", key.upper(), "", "__class__"))] = value
        else:
            parent.insert(key, parent[key])
    text = json.dumps(content, ensure_ascii=rng.random() < 0.5)
    return text.replace(f'"{PLACE}"', raw)


def _near(value: object, rng: random.Random) -> object:
    """Another value of the same type, which passes type checks."""
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, int):
        steps = (value + 1, value - 1, -value, value * 2, value * 1000, value << 20, value // 2, float(value))
        return rng.choice(steps)
    if isinstance(value, float):
        return rng.choice((-value, value * 1e9, value / 1e9, round(value) if abs(value) < 1e9 else 0, value + 0.01))
    if isinstance(value, str):
        at = rng.randrange(len(value) + 1)
        return rng.choice((value[:at], value * 2, value[:at] + "\n\x00é" + value[at:], value.upper(), value[::-1]))
    if isinstance(value, list):
        return rng.choice((value[::-1], value * 2, value[:1], value * 5000))
    return {str(k): [v] for k, v in value.items()}


def _places(content: object, depth: int = 0) -> Iterator[tuple[int, dict | list, str | int]]:
    """Depth, container and key of each value."""
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in list(items):
        yield depth, content, key
        yield from _places(value, depth + 1)


def onnx_file(data: bytes, rng: random.Random) -> bytes:
    """An ONNX file with edits of bytes or of the model, mostly without the checksum that would tell of them."""
    if rng.random() < 0.9:
        data = without_checksum(data)
    if rng.random() < 0.3:
        return bytewise(data, rng)
    model = onnx.ModelProto.FromString(data)
    for _ in range(rng.choice((1, 1, 2, 3))):
        rng.choice((_edit_tensor, _edit_tensor, _edit_node, _edit_node, _edit_value, _edit_metadata, _edit_model))(
            model, rng
        )
    data = model.SerializeToString(deterministic=True)
    return data + data[-rng.randrange(1, 400) :] if rng.random() < 0.03 else data


def without_checksum(data: bytes) -> bytes:
    """The same model, with a checksum of 0 (unknown)."""
    model = onnx.ModelProto.FromString(data)
    for entry in model.metadata_props:
        if entry.key == "smallm.checksum":
            entry.value = "0"
    return model.SerializeToString(deterministic=True)


def _edit_tensor(model: onnx.ModelProto, rng: random.Random) -> None:
    tensor = rng.choice(model.graph.initializer)
    kind = rng.randrange(9)
    if kind == 0 and tensor.dims:
        tensor.dims[rng.randrange(len(tensor.dims))] = rng.choice(NUMBERS)
    elif kind == 1:  # another shape with the same number of elements
        dims, one = list(tensor.dims), rng.randrange(len(tensor.dims) + 1)
        shapes = (dims[::-1], [*dims[:one], 1, *dims[one:]], [math.prod(dims)], [math.prod(dims), 1, 1])
        tensor.dims[:] = rng.choice(shapes)
    elif kind == 2:
        tensor.data_type = rng.choice((*range(24), 999))
    elif kind == 3:
        size = rng.choice((0, 1, len(tensor.raw_data) - 1, len(tensor.raw_data) * 2))
        tensor.raw_data = (tensor.raw_data * 2)[: max(0, size)]
    elif kind == 4 and tensor.data_type == TensorProto.INT64:
        tensor.raw_data = b"".join(struct.pack("<q", rng.choice(NUMBERS)) for _ in range(len(tensor.raw_data) // 8))
    elif kind == 5:
        tensor.raw_data = rng.randbytes(len(tensor.raw_data))
    elif kind == 6:
        external(tensor, rng.choice(LOCATIONS), rng)
    elif kind == 7:
        model.graph.initializer.append(tensor)
    else:
        tensor.name = rng.choice(model.graph.initializer).name


def external(tensor: onnx.TensorProto, location: str, rng: random.Random) -> None:
    """Declares the data of a tensor as external data in another file."""
    tensor.data_location = TensorProto.EXTERNAL
    size = len(tensor.raw_data)
    tensor.ClearField("raw_data")
    for key, value in (("location", location), ("offset", str(rng.choice((0, -1, 2**62)))), ("length", str(size))):
        tensor.external_data.add(key=key, value=value)


def _edit_node(model: onnx.ModelProto, rng: random.Random) -> None:
    nodes = model.graph.node
    at = rng.randrange(len(nodes))
    node, kind = nodes[at], rng.randrange(10)
    names = [name for other in nodes for name in (*other.input, *other.output)]
    if kind < 2:
        node.op_type = rng.choice(OPERATORS)
    elif kind == 2:
        node.domain = rng.choice(("", "com.microsoft", "ai.onnx.ml", "evil", "../x"))
    elif kind == 3:
        node.input[rng.randrange(len(node.input))] = rng.choice(names)
    elif kind == 4:
        node.output[rng.randrange(len(node.output))] = rng.choice(names)
    elif kind == 5:
        del nodes[at]
    elif kind == 6:
        nodes.append(node)
    elif kind == 7:
        value = rng.choice((model.graph, 7, 2.5))
        node.attribute.append(helper.make_attribute(rng.choice(("body", "axis", "alpha")), value))
    elif node.attribute:
        attribute = rng.choice(node.attribute)
        attribute.i, attribute.f = rng.choice(NUMBERS), rng.choice((0.0, -1.0, 1e38, float("nan"), float("inf")))
        if attribute.ints:
            attribute.ints[0] = rng.choice(NUMBERS)
        if rng.random() < 0.2:
            node.attribute.remove(attribute)


def _edit_value(model: onnx.ModelProto, rng: random.Random) -> None:
    values = rng.choice((model.graph.input, model.graph.output))
    value = rng.choice(values)
    kind = value.type.tensor_type
    choice = rng.randrange(6)
    if choice == 0:
        kind.elem_type = rng.choice((*range(24), 999))
    elif choice == 1 and kind.shape.dim:
        rng.choice(kind.shape.dim).dim_value = rng.choice(NUMBERS)
    elif choice == 2:
        value.name = rng.choice(values).name + rng.choice(("", "x"))
    elif choice == 3:
        values.remove(value)
    elif choice == 4:
        kind.shape.dim.add(dim_value=rng.choice(NUMBERS))
    else:
        value.type.sequence_type.elem_type.tensor_type.elem_type = 1


def _edit_metadata(model: onnx.ModelProto, rng: random.Random) -> None:
    entry = rng.choice(model.metadata_props)
    if rng.random() < 0.2:
        model.metadata_props.add(key=entry.key, value=entry.value)
    else:
        with suppress(ValueError, RecursionError):  # an earlier edit may have made the entry invalid or very deep
            entry.value = json_text([json.loads(entry.value)], rng, edits=1)[1:-1].encode("utf-8", "replace").decode()


def _edit_model(model: onnx.ModelProto, rng: random.Random) -> None:
    kind = rng.randrange(6)
    if kind == 0:
        model.ir_version = rng.choice(NUMBERS)
    elif kind == 1:
        rng.choice(model.opset_import).version = rng.choice((*NUMBERS, 18, 21, 25))
    elif kind == 2:
        model.opset_import.add(domain=rng.choice(("", "evil", "com.microsoft")), version=rng.choice((1, 17, 2**40)))
    elif kind == 3:
        node = rng.choice(model.graph.node)
        model.functions.append(helper.make_function("com.microsoft", node.op_type, list(node.input), list(node.output),
                                                    [node], list(model.opset_import)))  # fmt: skip
    elif kind == 4:
        model.graph.sparse_initializer.add().dims.append(2**40)
    else:
        rng.choice((model.graph.node, model.graph.initializer, model.opset_import)).pop()


def safetensors_file(data: bytes, rng: random.Random) -> bytes:
    """A safetensors file with edits of its bytes, its header, or the length of either part."""
    if rng.random() < 0.3:
        return bytewise(data, rng)
    (size,) = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    kind = rng.randrange(6)
    text = json.dumps(header).encode()
    if kind < 3:
        text = json_text(header, rng).encode("utf-8", "surrogatepass")
    elif kind == 3:
        body = bytewise(body, rng)
    else:
        name = rng.choice([name for name in header if name != "__metadata__"])
        entry = header[name]
        shape = entry["shape"]
        shapes = (shape[::-1], [math.prod(shape)], [n * shape[0] for n in shape], [1, 1], [2**40, 0], [2**63, 2])
        choices = ({"dtype": rng.choice(("F64", "F16", "BF16", "I64", "U8", "BOOL", "F8_E4M3", "F4", "C64", ""))},
                   {"shape": rng.choice(shapes)}, {"data_offsets": [0, rng.choice(NUMBERS)]})  # fmt: skip
        header[name] = entry | rng.choice(choices)
        text = json.dumps(header).encode()
    length = len(text) if rng.random() < 0.9 else rng.choice(NUMBERS) & (1 << 64) - 1
    return struct.pack("<Q", length) + text + body


TOML_VALUES = [10**30, "nan", "inf", "-inf", "1e308", "true", '""', '"x"', '"\\u0000\\n"', "[]", "{}", "[1, [2]]",
               "0x10", "1979-05-27", "9" * 400, "9" * 5000, "[" * 3000, "1_0", "+3"]  # fmt: skip
TOML_LINES = ['"a\\nb" = 1', "[train.x]", "[[model]]", "model = 3", "a.b.c.d = 1", '"" = ""', "__class__ = 1"]


def toml_text(text: str, rng: random.Random) -> bytes:
    """A TOML file with edits of its values, its lines or its bytes."""
    if rng.random() < 0.25:
        return bytewise(text.encode(), rng)
    for _ in range(rng.choice((1, 1, 2, 3))):
        lines = text.splitlines()
        at = rng.randrange(len(lines))
        kind = rng.randrange(8)
        if kind < 5:
            value = rng.choice((*AFFORDABLE, *TOML_VALUES))
            lines[at] = re.sub(r"=.*", lambda _, v=value: f"= {v}", lines[at])
        elif kind == 5:
            lines.insert(at, rng.choice(lines))
        elif kind == 6:
            del lines[at]
        else:
            lines.insert(at, rng.choice(TOML_LINES))
        text = "\n".join(lines) + "\n"
    return text.encode()


ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32", "utf-7", "latin-1", "cp1252", "ascii", "shift_jis",
             "gb18030", "big5", "iso2022_jp", "hz", "unicode_escape", "raw_unicode_escape", "idna", "punycode", "hex",
             "rot13", "mbcs", "undefined", "no-such", "", "utf\n8", "zlib", "cp037", "johab", "../utf-8"]  # fmt: skip
ALPHABETS = ["ab \n", "éñ€中🎉", "\x00\x01\x7f\x1b\r\x85\u2028", "\ufeff\ufffe\uffff\U0010ffff", "a\u0301\u200d\u202e"]


def text(rng: random.Random, length: int) -> str:
    """Characters of one to three alphabets, among them control characters and unassigned code points."""
    letters = "".join(rng.sample(ALPHABETS, rng.choice((1, 1, 2, 3))))
    period = "".join(rng.choices(letters, k=min(length, rng.choice((1, 3, 50, 2000)))))
    return (period * (length // max(1, len(period)) + 1))[:length]


def text_file(rng: random.Random) -> tuple[bytes, str]:
    """The bytes of a text and the encoding to declare, which may be wrong."""
    encoding = rng.choice((*ENCODINGS, *["utf-8"] * 20))
    content = text(rng, rng.choice((0, 1, 2, 10, 600, 600, 600, 3000)))
    try:
        data = content.encode(encoding, "surrogatepass" if encoding.startswith("utf") else "replace")
    except (LookupError, UnicodeError, ValueError, TypeError):
        data = content.encode()
    kind = rng.randrange(4)
    if kind == 0:
        data = bytewise(data, rng)
    elif kind == 1:
        data = rng.choice((data * 3, rng.randbytes(rng.choice((1, 700, 5000))), b"\xff\xfe" + data, b"\x00" * 700))
    return data, rng.choice((encoding, encoding, rng.choice(ENCODINGS)))
