"""The door to ONNX Runtime: a model file as a function of ids, with or without a cache. Nothing else imports it."""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnxruntime as ort

from smallm.errors import UserError
from smallm.inference.kv_cache import KVCache
from smallm.model_file.manifest import Manifest
from smallm.model_file.onnx_reader import FLOAT, INT64, read_onnx

MAX_THREADS = 1024
BIG_LAYER_BYTES = 1_000_000  # of weights; below it a second thread costs a single id more in hand-overs than it saves


class Session:
    """A loaded model. Shapes: B batch, T time, V vocabulary."""

    def __init__(self, path: str | Path, threads: int | None = None):
        """threads: None = as many as suit the work. Raises `UserError` for a file that is not a smallm model."""
        self.path = path = Path(path)
        if threads is not None and not 1 <= threads <= MAX_THREADS:
            raise UserError(f"threads = {threads} is out of range; it must be 1 or more, at most {MAX_THREADS}")
        if not path.is_file():
            raise UserError(f"there is no model file {path}; write one with `python export.py`")
        file = read_onnx(path)
        self.manifest = m = Manifest.from_metadata(file.metadata, path)
        m.check_size(file.size, path)
        parts = [f"{i}.{part}" for i in range(m.n_layer) for part in ("key", "value")]
        self.past, self.present = ([f"{side}.{part}" for part in parts] for side in ("past_key_values", "present"))
        promised = {name: (INT64, []) for name in ("input_ids", "attention_mask", "num_logits_to_keep")}
        promised |= {name: (FLOAT, [m.n_kv_head, m.head_dim]) for name in self.past + self.present}
        if file.values != promised | {"logits": (FLOAT, [m.vocab_size])}:
            raise UserError(f"{path} has not the inputs and outputs that its metadata promise; export the model again")
        self.layer_bytes = file.size // m.n_layer
        self.threads = threads or default_threads(self.layer_bytes)
        """For single ids."""
        self._session = self._open(self.threads)
        self._many_threads = threads or default_threads()
        self._many: ort.InferenceSession | None = None

    def _open(self, threads: int) -> ort.InferenceSession:
        options = ort.SessionOptions()
        options.add_session_config_entry("session.load_model_format", "ONNX")  # what was checked, whatever its name
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 4  # what goes wrong comes as an exception
        try:
            with _environment("ORT_GQA_DISABLE_FLASH_ATTENTION", "1"):  # slower by a fifth or more, for one id and many
                return ort.InferenceSession(str(self.path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's own errors share no base class
            needed = str(self.manifest.quality.get("onnxruntime", ""))
            if _version(ort.__version__) < _version(needed):
                raise UserError(
                    f"{self.path} needs ONNX Runtime {needed} or newer, this is {ort.__version__}; "
                    "install that, or export with another --precision"
                ) from None
            raise self.failure(error) from None

    def logits(self, ids: np.ndarray) -> np.ndarray:
        """ids (B, T) -> logits (B, T, V), without a cache; T up to block_size. Raises `UserError`."""
        return self._forward(self._session_for(ids.size), ["logits"], ids, None)[0]

    def step(self, ids: np.ndarray, cache: list[np.ndarray] | None) -> tuple[np.ndarray, list[np.ndarray]]:
        """As `logits`, on top of a cache: the list that the step before returned, or None. Returns it with ids added.

        This is how hosts without shared buffers do it; a `KVCache` is faster.
        """
        logits, *cache = self._forward(self._session, ["logits", *self.present], ids, cache)
        return logits, cache

    def _forward(
        self, session: ort.InferenceSession, outputs: list[str], ids: np.ndarray, cache: list[np.ndarray] | None
    ) -> list[np.ndarray]:
        m, (B, T) = self.manifest, ids.shape
        cache = cache or [np.zeros((B, m.n_kv_head, 0, m.head_dim), np.float32)] * len(self.past)
        mask = np.ones((B, cache[0].shape[2] + T), np.int64)
        feeds = {"input_ids": ids.astype(np.int64), "attention_mask": mask, **dict(zip(self.past, cache, strict=True))}
        try:
            found = session.run(outputs, feeds)
        except Exception as error:
            raise self.failure(error) from None
        if found[0].shape != (B, T, m.vocab_size):
            raise self.failure(ValueError(f"the logits have the shape {found[0].shape}"))
        return found

    def failure(self, error: Exception) -> UserError:
        """What to tell the user when ONNX Runtime fails in the middle of the work."""
        return UserError(f"{self.path} is broken, export the model again; ONNX Runtime says: {_first_line(error)}")

    def decoder(self, streams: int = 1) -> KVCache:
        """New, empty caches over this model, for so many texts. Raises `UserError` if the graph is not what it says."""
        try:
            return KVCache(self, streams)
        except Exception as error:  # an input that the graph does not use is none to ONNX Runtime
            raise self.failure(error) from None

    def bound(self, rows: int) -> tuple[ort.IOBinding, Callable[[], None]]:
        """For so many rows of a `KVCache`: where inputs lie and outputs go, and what computes them, or raises."""
        session = self._session_for(rows)
        binding = session.io_binding()

        def run() -> None:
            try:
                session.run_with_iobinding(binding)
            except Exception as error:
                raise self.failure(error) from None

        return binding, run

    def _session_for(self, ids: int) -> ort.InferenceSession:
        """One with the threads that suit so many ids at a time; the second is opened when first needed."""
        if ids == 1 or self._many_threads == self.threads:
            return self._session
        if self._many is None:
            self._many = self._open(self._many_threads)
        return self._many


def default_threads(layer_bytes: int = BIG_LAYER_BYTES) -> int:
    """Half of the logical processors, from 2 to 4, but one for single ids through small layers."""
    return 1 if layer_bytes < BIG_LAYER_BYTES else min(4, max(2, (os.cpu_count() or 1) // 2))


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    """An environment variable that ONNX Runtime reads while it makes a session, and no longer."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _version(text: str) -> tuple[int, ...]:
    """Major and minor number; nothing for what is no version."""
    found = re.match(r"(\d{1,5})\.(\d{1,5})", text)
    return tuple(map(int, found.groups())) if found else ()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
