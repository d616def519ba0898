"""The C kit as a library: `smallm/embed/c/smallm.c`, compiled on this machine at first use, generates a text."""

import ctypes
import os
import platform
import shutil
import subprocess
import weakref
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from smallm.errors import UserError
from smallm.inference.compiler import INSTALL, compile_library, stored_library
from smallm.runs.cache_folder import cache_folder

SOURCE = Path(__file__).parents[1] / "embed" / "c" / "smallm.c"
PREBUILT = Path(__file__).with_name("smallm_native.dll" if platform.system() == "Windows" else "smallm_native.so")
"""The compiled library, which wheels for one platform have; see `.ci/build_hook.py`."""
FLAGS = ("-O2", "-std=c99", "-shared", "-fPIC")
OK, DONE = 0, 1
MAX_THREADS, MAX_DRAFTS = 256, 4  # of smallm.c
OVERFLOW = {"crop": 0, "shift": 1, "slide": 2}


class OpenOptions(ctypes.Structure):
    """The struct smallm_open_options of smallm.h."""

    _fields_ = [("size", ctypes.c_size_t), ("kernels", ctypes.c_char_p), ("threads", ctypes.c_size_t)]


class Options(ctypes.Structure):
    """The struct smallm_options of smallm.h."""

    _fields_ = [
        ("size", ctypes.c_size_t), ("max_length", ctypes.c_int64), ("temperature", ctypes.c_double),
        ("top_k", ctypes.c_int64), ("top_p", ctypes.c_double), ("min_p", ctypes.c_double),
        ("repetition_penalty", ctypes.c_double), ("repetition_window", ctypes.c_int64), ("rng_seed", ctypes.c_uint32),
        ("stream_number", ctypes.c_uint32), ("stops", ctypes.POINTER(ctypes.c_char_p)), ("stop_count", ctypes.c_size_t),
        ("min_length", ctypes.c_int64), ("overflow", ctypes.c_int32), ("logprobs", ctypes.c_int32),
        ("allowed", ctypes.c_char_p), ("banned", ctypes.c_char_p), ("max_drafts", ctypes.c_int32),
    ]  # fmt: skip


class NativeModel:
    """A model file that the C library has opened; threads may share it."""

    def __init__(self, path: Path, threads: int = 1, speculative: bool = True):
        """threads: threads that compute a text together, 1 or more; more than `MAX_THREADS` count as this number.
        speculative: whether to use a draft table beside the file.

        Raises `UserError` without a C compiler, and for a file that is damaged.
        """
        self.path, self.library, self.pointer = path, native_library(), ctypes.c_void_p()
        self.threads, self.speculative = min(threads, MAX_THREADS), speculative
        options = OpenOptions(ctypes.sizeof(OpenOptions), None, self.threads)
        status = self.library.smallm_open(os.fsencode(path), ctypes.byref(options), ctypes.byref(self.pointer))
        message = self.library.smallm_model_error(self.pointer).decode(errors="replace")
        weakref.finalize(self, self.library.smallm_close, self.pointer)
        if status != OK:
            raise UserError(message)

    def __reduce__(self) -> tuple[type["NativeModel"], tuple[Path, int, bool]]:
        return NativeModel, (self.path.absolute(), self.threads, self.speculative)


class NativeContext:
    """One text and its KV cache."""

    def __init__(self, model: NativeModel, original: "NativeContext | None" = None):
        """original: the context to copy; None = without a text."""
        self._model, self._library, self._context = model, model.library, ctypes.c_void_p()
        self._text, self._bytes, self._count = ctypes.c_void_p(), ctypes.c_size_t(), ctypes.c_size_t()
        self._outputs = ctypes.byref(self._text), ctypes.byref(self._bytes)
        if original is None:
            status = self._library.smallm_context_new(model.pointer, ctypes.byref(self._context))
        else:
            status = self._library.smallm_context_copy(original._context, ctypes.byref(self._context))
        if status != OK:
            raise UserError("there is not enough memory for this; use a smaller model")
        weakref.finalize(self, _free, model, self._context)

    def __reduce__(self) -> NoReturn:
        raise UserError("a text that is being written cannot be copied or pickled; use its method branch")

    def start(self, seed: str, options: Mapping[str, Any]) -> None:
        """Begins a text. options: the fields of `GenerationConfig`, resolved for the model, and logprobs."""
        fields = {name: value for name, value in options.items() if name not in ("stop", "overflow")}
        for name in ("allowed", "banned"):
            fields[name] = None if fields[name] is None else _encoded(name, fields[name])
        stops = [_encoded("stop", each) for each in options["stop"]]
        fields |= {"stops": (ctypes.c_char_p * len(stops))(*stops), "stop_count": len(stops)}
        fields |= {"overflow": OVERFLOW[options["overflow"]], "max_drafts": MAX_DRAFTS * self._model.speculative}
        struct, text = Options(size=ctypes.sizeof(Options), **fields), seed.encode()
        self._check(self._library.smallm_generate_start(self._context, text, len(text), ctypes.byref(struct)))

    def piece(self) -> str:
        """The next characters; "" at the end. After an exception within this call it returns the same characters."""
        if not self._bytes.value:
            self._check(self._library.smallm_next(self._context, *self._outputs))
        return self.computed_piece()

    def computed_piece(self) -> str:
        """The piece that was computed and is not finished; "" without one."""
        return ctypes.string_at(self._text.value or 0, self._bytes.value).decode() if self._bytes.value else ""

    def logprobs(self) -> list[float]:
        """The log-probability of each character of the piece."""
        found = self._library.smallm_logprobs(self._context, ctypes.byref(self._count))
        return list(found[: self._count.value])

    def finish_piece(self) -> bool:
        """Frees the piece; whether the text is complete. The call may be repeated."""
        done = self._check(self._library.smallm_take(self._context, ctypes.byref(ctypes.c_void_p()),
                                                     ctypes.byref(ctypes.c_size_t()))) == DONE  # fmt: skip
        self._bytes.value = 0
        return done

    def score(self, text: str) -> np.ndarray:
        """The nats of each character, (len(text),) float64; NaN for the first."""
        encoded, nats = text.encode(), (ctypes.c_double * len(text))()
        sizes = ctypes.c_size_t(len(encoded)), nats, ctypes.c_size_t(len(text))
        self._check(self._library.smallm_score(self._context, encoded, *sizes, ctypes.byref(self._count)))
        return np.array(nats)

    def copy(self) -> "NativeContext":
        """A context that continues from here independently."""
        return NativeContext(self._model, self)

    def reseed(self, rng_seed: int, stream_number: int) -> None:
        """Continues with the random numbers of another seed."""
        self._library.smallm_reseed(self._context, ctypes.c_uint32(rng_seed), ctypes.c_uint32(stream_number))

    def _check(self, status: int) -> int:
        if status > DONE:
            raise UserError(self._library.smallm_error(self._context).decode())
        return status


def _free(model: NativeModel, context: ctypes.c_void_p) -> None:
    model.library.smallm_context_free(context)  # before the model, which this reference keeps


def _encoded(name: str, text: str) -> bytes:
    if "\0" in text:
        raise UserError(f"{name} = {text!r:.40} has a NUL, which engine = 'native' does not accept; remove it")
    return text.encode()


def is_compiled() -> bool:
    """Whether the C library is there already: from the wheel, or compiled on this machine before."""
    compiler = _compiler()
    return PREBUILT.is_file() or (compiler is not None and stored_library(compiler, FLAGS, SOURCE) is not None)


def _compiler() -> str | None:
    return shutil.which(os.environ.get("CC", "cc")) if platform.system() in INSTALL else None


@cache
def native_library() -> Any:
    """The C library, that of the wheel or compiled now. Raises `UserError`."""
    if PREBUILT.is_file():
        with suppress(OSError):  # the library of another platform
            return _declared(ctypes.CDLL(str(PREBUILT)))
    if not SOURCE.is_file():
        raise UserError(
            "engine = 'native' needs smallm.c, which this program lacks; collect the data files of smallm "
            "(PyInstaller: --collect-data smallm), or leave out the engine"
        )
    compiler = _compiler()
    if compiler is None:
        install = INSTALL.get(platform.system())
        raise UserError(
            "engine = 'native' needs a C compiler, and this machine has none; "
            + (f"install one ({install}), or leave out the engine" if install else "leave out the engine")
        )
    try:
        return _declared(ctypes.CDLL(str(compile_library(compiler, FLAGS, SOURCE))))
    except (OSError, subprocess.SubprocessError) as error:
        problem, advice = f"{compiler} cannot compile {SOURCE.name}: {error}", "leave out engine = 'native'"
        if isinstance(error, OSError) and str(error.filename or "").startswith(str(cache_folder())):
            problem, advice = f"cannot write to {cache_folder()}: {error.strerror}", f"set SMALLM_CACHE, or {advice}"
        raise UserError(f"{problem}; {advice}") from None


def _declared(library: Any) -> Any:
    """The library with the types of its functions."""
    for name in ("smallm_model_error", "smallm_error"):
        getattr(library, name).restype = ctypes.c_char_p
    library.smallm_logprobs.restype = ctypes.POINTER(ctypes.c_double)
    library.smallm_generate_start.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_void_p]
    return library
