"""Reads and checks an ONNX file before ONNX Runtime opens it, because the file may come from a stranger.

An ONNX file is a protobuf message, a sequence of fields: a key (number << 3 | wire type), then the value. The tables
below list the fields that a smallm model may have, by message. All other fields are refused, as are operators not in
`OPERATORS`, data in other files and tensors whose data does not match their shape. The weights are not read.
"""

import math
import mmap
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smallm.errors import UserError, command

_OPERATORS = """
    Add Cast Concat ConstantOfShape Div Expand Gather Greater GroupQueryAttention Less MatMul MatMulNBits Max Mul
    Or QuickGelu Range ReduceMean ReduceSum Reshape ScatterElements Shape Sigmoid SimplifiedLayerNormalization
    SkipSimplifiedLayerNormalization Slice Softmax Split Sqrt Squeeze Sub Tile Transpose Unsqueeze Where
    ArgMax Neg
"""  # the last line: only in exports of earlier versions
OPERATORS = frozenset(_OPERATORS.split())
"""The operators that smallm exports; a test compares them with real exports. No control flow, nothing random."""
DOMAINS = frozenset({"", "ai.onnx", "com.microsoft"})
MAX_NODES = 20_000
MAX_PARTS = 150_000  # messages in a file, or values of a repeated field; with MAX_NODES, bounds the memory of a parse
MAX_DIMENSIONS = 8

FLOAT, INT64 = 1, 7
BITS = {FLOAT: 32, 2: 8, 3: 8, 4: 16, 5: 16, 6: 32, INT64: 64, 9: 8, 10: 16, 11: 64, 12: 32, 13: 64, 16: 16,
        21: 4, 22: 4}  # fmt: skip
"""Element type (TensorProto.DataType) -> bits of an element."""

# Field number -> name and kind: int (varint), float, str, bytes or another message; a list for a repeated field.
Message = dict[int, tuple[str, Any]]
ENTRY: Message = {1: ("key", str), 2: ("value", str)}
TENSOR: Message = {
    1: ("dims", [int]), 2: ("data_type", int), 8: ("name", str), 9: ("raw_data", bytes), 12: ("doc_string", str),
    13: ("external_data", [ENTRY]), 14: ("data_location", int),
}  # fmt: skip
ATTRIBUTE: Message = {
    1: ("name", str), 2: ("f", float), 3: ("i", int), 4: ("s", bytes), 5: ("t", TENSOR), 7: ("floats", [float]),
    8: ("ints", [int]), 9: ("strings", [bytes]), 13: ("doc_string", str), 20: ("type", int),
}  # fmt: skip
NODE: Message = {
    1: ("input", [str]), 2: ("output", [str]), 3: ("name", str), 4: ("op_type", str), 5: ("attribute", [ATTRIBUTE]),
    6: ("doc_string", str), 7: ("domain", str),
}  # fmt: skip
DIMENSION: Message = {1: ("dim_value", int), 2: ("dim_param", str), 3: ("denotation", str)}
TENSOR_TYPE: Message = {1: ("elem_type", int), 2: ("shape", {1: ("dim", [DIMENSION])})}
VALUE: Message = {1: ("name", str), 2: ("type", {1: ("tensor_type", TENSOR_TYPE)}), 3: ("doc_string", str)}
GRAPH: Message = {
    1: ("node", [NODE]), 2: ("name", str), 5: ("initializer", [TENSOR]), 10: ("doc_string", str),
    11: ("input", [VALUE]), 12: ("output", [VALUE]), 13: ("value_info", [VALUE]),
}  # fmt: skip
GRAPH_FIELD = 7
MODEL: Message = {
    1: ("ir_version", int), 2: ("producer_name", str), 3: ("producer_version", str), 4: ("domain", str),
    5: ("model_version", int), 6: ("doc_string", str), GRAPH_FIELD: ("graph", GRAPH),
    8: ("opset_import", [{1: ("domain", str), 2: ("version", int)}]), 14: ("metadata_props", [ENTRY]),
}  # fmt: skip


@dataclass(frozen=True)
class OnnxFile:
    """The content of a file that passed the checks."""

    data: bytes
    """The bytes that were checked."""
    metadata: dict[str, str]
    values: dict[str, tuple[int, list[int]]]
    """Input or output -> its element type and its fixed dimensions."""

    @property
    def checksum(self) -> int:
        """Adler-32 (RFC 1950) of the graph, weights included."""
        return next(zlib.adler32(value) for number, _, value in fields(memoryview(self.data)) if number == GRAPH_FIELD)


def read_onnx(path: Path) -> OnnxFile:
    """Reads and checks a file. Raises `UserError` if the file is not an ONNX model as smallm writes it."""
    try:
        with path.open("rb") as file:
            _checked(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))  # takes no memory, however large the file is
            data = file.read()
            return OnnxFile(data, *_checked(data))  # again, because another program may write to the file meanwhile
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except UserError as error:
        raise UserError(f"{path} is not a smallm model: {error}; write one with: {command('export')}") from None
    except ValueError as error:
        raise UserError(f"{path} is truncated or not an ONNX model ({error}); export the model again") from None


def _checked(data: bytes | mmap.mmap) -> tuple[dict[str, str], dict[str, tuple[int, list[int]]]]:
    """Metadata and values. Raises `UserError` if smallm did not write the file, `ValueError` if it is not ONNX."""
    model = read_message(memoryview(data), MODEL)
    if "graph" not in model:
        raise ValueError("it has no graph")
    graph = model["graph"]
    for node in graph["node"]:
        kind, domain = node.get("op_type", ""), node.get("domain", "")
        if kind not in OPERATORS or domain not in DOMAINS:
            raise UserError(f"it uses the operator {'.'.join(filter(None, (domain, kind)))!r:.80}")
        for attribute in node["attribute"]:
            if "t" in attribute:
                _check_tensor(attribute["t"])
    for tensor in graph["initializer"]:
        _check_tensor(tensor)
    metadata = {entry.get("key", ""): entry.get("value", "") for entry in model["metadata_props"]}
    if len(metadata) != len(model["metadata_props"]):
        raise UserError("its metadata has a key twice")
    return metadata, dict(map(_value, graph["input"] + graph["output"]))


def _check_tensor(tensor: dict[str, Any]) -> None:
    name, dims, bits = tensor.get("name", ""), tensor["dims"], BITS.get(tensor.get("data_type", 0))
    if tensor["external_data"] or tensor.get("data_location", 0):
        raise UserError(f"the tensor {name!r:.80} is stored in another file")
    if bits is None or len(dims) > MAX_DIMENSIONS or not all(0 <= n < 1 << 31 for n in dims):
        raise UserError(f"the tensor {name!r:.80} has an unknown type or shape")
    if (math.prod(dims) * bits + 7) // 8 != tensor.get("raw_data", 0):
        raise UserError(f"the tensor {name!r:.80} does not have the size of its shape")


def _value(value: dict[str, Any]) -> tuple[str, tuple[int, list[int]]]:
    kind = value.get("type", {}).get("tensor_type", {})
    dims = kind.get("shape", {}).get("dim", [])
    return value.get("name", ""), (kind.get("elem_type", 0), [n["dim_value"] for n in dims if "dim_value" in n])


def read_message(data: memoryview, message: Message, parts: list[None] | None = None) -> dict[str, Any]:
    """Name -> value of each field of a message, or a list of values for a repeated field.

    Bytes are given as their length, floats are skipped.

    parts: grows by one for each message, also for those within this one.
    Raises `ValueError` for data that is not such a message, `UserError` for more than MAX_PARTS.
    """
    parts = [] if parts is None else parts
    parts.append(None)
    found: dict[str, Any] = {name: [] for name, kind in message.values() if type(kind) is list}
    for number, wire_type, value in fields(data):
        if number not in message:
            raise ValueError(f"an unknown field {number} beside {', '.join(n for n, _ in message.values())}")
        name, kind = message[number]
        if type(kind) is list:
            if wire_type == 2 and kind[0] is int:
                found[name] += packed(value[:MAX_PARTS])
            elif wire_type != 2 or kind[0] is not float:
                found[name].append(_convert(value, wire_type, kind[0], parts))
            most, what = (MAX_NODES, "nodes") if kind[0] is NODE else (MAX_PARTS - len(parts), "parts")
            if len(found[name]) > most:
                raise UserError(f"it has more than {MAX_NODES if what == 'nodes' else MAX_PARTS:,} {what}")
        elif name in found:  # protobuf would merge the two, or take the last one
            raise ValueError(f"a second {name}")
        else:
            found[name] = _convert(value, wire_type, kind, parts)
    return found


def fields(data: memoryview | bytes) -> Iterator[tuple[int, int, Any]]:
    """Number, wire type and value of each field: an int for varints (0), a view of the bytes for the others.

    Raises `ValueError` if the last field is incomplete.
    """
    value: int | memoryview | bytes
    at, end = 0, len(data)
    data = data if end > 4096 else bytes(data)  # faster to index than a view
    while at < end:
        key, at = (data[at], at + 1) if data[at] < 0x80 else _varint(data, at)  # most take one byte: saves a call
        wire_type = key & 7
        if wire_type == 0:
            value, at = _varint(data, at)
        else:
            if wire_type == 2:
                length, at = (data[at], at + 1) if at < end and data[at] < 0x80 else _varint(data, at)
            elif wire_type in (1, 5):
                length = 8 if wire_type == 1 else 4
            else:
                raise ValueError(f"wire type {wire_type}")
            if length > end - at:
                raise ValueError(f"a field of {length} bytes where {end - at} are left")
            value = data[at : at + length]
            at += length
        yield key >> 3, wire_type, value


def packed(data: memoryview) -> list[int]:
    """The integers of a packed field."""
    numbers, at = [], 0
    while at < len(data):
        number, at = _varint(data, at)
        numbers.append(_signed(number))
    return numbers


def _convert(value: Any, wire_type: int, kind: Any, parts: list[None]) -> Any:
    if wire_type != (0 if kind is int else 5 if kind is float else 2):
        raise ValueError(f"wire type {wire_type} in a wrong place")
    if kind is int:
        return _signed(value)
    if kind is str:
        return str(value, "utf-8")
    if kind is bytes:
        return len(value)
    return None if kind is float else read_message(value, kind, parts)


def _varint(data: memoryview | bytes, at: int) -> tuple[int, int]:
    """The number of up to 64 bits that starts at `at`, with seven bits in each byte, and the offset after its end."""
    number = 0
    for shift in range(0, 70, 7):
        if at == len(data):
            raise ValueError("its end is missing")
        byte = data[at]
        at += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80 and number >> 64 == 0:
            return number, at
    raise ValueError("a number longer than 64 bits")


def _signed(number: int) -> int:
    return number - (1 << 64) if number >> 63 else number
