"""The wrapper of ONNX Runtime: a model file as a function of ids. No other module imports onnxruntime."""

import os
import re
from pathlib import Path
from threading import Lock
from typing import NoReturn

import numpy as np

from smallm.errors import UserError, command
from smallm.inference.processors import usable_processors
from smallm.model_file.manifest import Manifest
from smallm.model_file.onnx_reader import FLOAT, INT64, read_onnx
from smallm.options import check_int

# ONNX Runtime reads these variables when it is imported and when a session is made. They are set once, here, since a
# change of the environment while other threads read it can crash a process. A value that the user has set is kept.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # otherwise 1.32 writes a device id and looks up a host
os.environ.setdefault("ORT_GQA_DISABLE_FLASH_ATTENTION", "1")  # flash attention is slower here by a fifth or more

import onnxruntime as ort

MAX_THREADS = 1024
BIG_LAYER_BYTES = 800_000  # weights of a layer; in smaller layers a second thread slows down single ids


class Session:
    """A loaded model, which threads may share. Shapes: B batch, T time, V vocabulary.

    A copy (pickle, deepcopy) opens the file again.
    """

    def __init__(self, path: str | Path, threads: int | None = None):
        """Opens an .onnx file that `export.py` wrote.

        threads: intra-op threads, 1 to 1024; None chooses by the size of the layers and the number of processors.
        Raises `UserError` for a file that is missing, damaged or not a smallm model.
        """
        self.path = path = Path(path)
        if threads is not None:
            check_int("threads", threads, 1, MAX_THREADS)
        if not path.is_file():
            raise UserError(f"there is no model file {path}; write one with: {command('export')}")
        file = read_onnx(path)
        self.manifest = m = Manifest.from_metadata(file.metadata, path)
        m.check_file(file, path)
        parts = [f"{i}.{part}" for i in range(m.n_layer) for part in ("key", "value")]
        self.past, self.present = ([f"{side}.{part}" for part in parts] for side in ("past_key_values", "present"))
        promised: dict[str, tuple[int, list[int]]] = {
            name: (INT64, []) for name in ("input_ids", "attention_mask", "num_logits_to_keep")
        }
        promised |= {name: (FLOAT, [m.n_kv_head, m.head_dim]) for name in self.past + self.present}
        if file.values != promised | {"logits": (FLOAT, [m.vocab_size])}:
            raise UserError(f"{path}: inputs and outputs do not match its metadata; export the model again")
        self.layer_bytes = layer_bytes(len(file.data), m)
        self._given_threads = threads
        self.threads = threads or default_threads(self.layer_bytes)
        """Threads for passes of a single id."""
        self._session: ort.InferenceSession | None = self._open(file.data, self.threads)
        self._many_threads = threads or default_threads()
        self._many: ort.InferenceSession | None = None  # for passes of many ids; opened when first needed
        self._data = file.data if self._many_threads != self.threads else b""  # the file may be replaced before then
        self._opening = Lock()

    def logits(self, ids: np.ndarray) -> np.ndarray:
        """Logits (B, T, V) of ids (B, T), without a KV cache; T is at most block_size. Raises `UserError`."""
        return self._forward(self._session_for(ids.size), ["logits"], ids, None)[0]

    def forward_with_past(
        self, ids: np.ndarray, past: list[np.ndarray] | None
    ) -> tuple[np.ndarray, list[np.ndarray]]:
        """Logits (B, T, V) of ids (B, T) after the past, and the past with these ids added.

        past: the list that the previous call returned; None at the start. Hosts whose ONNX Runtime cannot share buffers
        run the model like this, so the parity check of the export does it too. `KVCache` is faster.
        """
        logits, *past = self._forward(self._session_for(1), ["logits", *self.present], ids, past)
        return logits, past

    def __reduce__(self) -> tuple[type["Session"], tuple[Path, int | None]]:
        return Session, (self.path.absolute(), self._given_threads)

    def close(self) -> None:
        """Frees ONNX Runtime's sessions; bindings that exist keep theirs."""
        with self._opening:
            self._session, self._many, self._data = None, None, b""

    def bind(self) -> "Binding":
        """A new binding, with the threads that suit single ids: more threads slow down batches of small models too."""
        return Binding(self, self._session_for(1))

    def failure(self, error: Exception) -> UserError:
        """The message for an error that ONNX Runtime raised while it ran the model."""
        return UserError(f"{self.path} is broken, export the model again; ONNX Runtime says: {_first_line(error)}")

    def _open(self, data: bytes, threads: int) -> ort.InferenceSession:
        options = ort.SessionOptions()
        options.add_session_config_entry("session.load_model_format", "ONNX")  # the format that was checked
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 4  # errors are raised; the log would only repeat them
        try:
            return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's errors share no base class
            needed = _version(self.manifest.quality.get("onnxruntime") or "")
            if _version(ort.__version__) < needed:
                raise UserError(
                    f"{self.path} needs ONNX Runtime {'.'.join(map(str, needed))} or newer, this is {ort.__version__}; "
                    "install that, or export with another --precision"
                ) from None
            raise self.failure(error) from None

    def _forward(
        self, session: ort.InferenceSession, outputs: list[str], ids: np.ndarray, past: list[np.ndarray] | None
    ) -> list[np.ndarray]:
        m, (B, T) = self.manifest, ids.shape
        past = past or [np.zeros((B, m.n_kv_head, 0, m.head_dim), np.float32)] * len(self.past)
        mask = np.ones((B, past[0].shape[2] + T), np.int64)
        feeds = {"input_ids": ids.astype(np.int64), "attention_mask": mask, **dict(zip(self.past, past, strict=True))}
        try:
            found: list[np.ndarray] = session.run(outputs, feeds)
        except Exception as error:
            raise self.failure(error) from None
        if found[0].shape != (B, T, m.vocab_size):
            raise self.failure(ValueError(f"the logits have the shape {found[0].shape}"))
        return found

    def _session_for(self, ids: int) -> ort.InferenceSession:
        """The session whose number of threads suits this number of ids per pass."""
        session = self._session  # another thread may close the model
        if session is not None and ids > 1 and self._many_threads != self.threads:
            with self._opening:
                if self._data:
                    self._many, self._data = self._open(self._data, self._many_threads), b""
                session = self._many
        if session is None:
            raise UserError(f"{self.path} was closed; load the model again")
        return session


class Binding:
    """The arrays that ONNX Runtime reads and writes in a pass, bound once. The caller keeps the arrays alive."""

    def __init__(self, owner: Session, session: ort.InferenceSession):
        self._owner, self._binding, self._run = owner, session.io_binding(), session.run_with_iobinding

    def __reduce__(self) -> NoReturn:
        raise UserError("a text that is being written cannot be copied or pickled; use its method branch")

    def input(self, name: str, array: np.ndarray) -> None:
        """Binds an input to a contiguous array. Raises `UserError` if the graph does not use this input."""
        try:
            self._binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        except Exception as error:
            raise self._owner.failure(error) from None

    def output(self, name: str, array: np.ndarray) -> None:
        """Binds an output to a contiguous float32 array. Raises `UserError` if the graph does not have this output."""
        try:
            self._binding.bind_output(name, "cpu", 0, np.float32, array.shape, array.ctypes.data)
        except Exception as error:
            raise self._owner.failure(error) from None

    def run(self) -> None:
        """One pass of the model. Raises `UserError` if ONNX Runtime fails."""
        try:
            self._run(self._binding)
        except Exception as error:
            raise self._owner.failure(error) from None


def default_threads(layer_bytes: int = BIG_LAYER_BYTES) -> int:
    """1 for small layers; otherwise half of the usable processors, at least 2 (if there are 2) and at most 4."""
    if layer_bytes < BIG_LAYER_BYTES:
        return 1
    processors = usable_processors()
    return min(4, processors, max(2, processors // 2))


def layer_bytes(file_bytes: int, model: Manifest) -> int:
    """Bytes of the weights of a layer: those of the file without the arrays with one row per id or position."""
    per_id = model.n_embd  # the embedding
    if model.vocab_size <= 4 * model.n_embd:  # then the first layer's projection is such a table as well
        per_id += (model.n_head + 2 * model.n_kv_head) * model.head_dim
    rows = model.vocab_size * per_id + model.block_size * model.head_dim  # the second: cos and sin
    return max(0, file_bytes - 4 * rows) // model.n_layer


def _version(text: str) -> tuple[int, ...]:
    """(major, minor); () if the text is not a version."""
    found = re.match(r"(\d{1,5})\.(\d{1,5})", text)
    return tuple(map(int, found.groups())) if found else ()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
