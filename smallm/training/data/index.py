"""Which text a file holds, remembered as long as the file stays as it is: so that it need not be read to be known."""

import hashlib
import json
import time
from contextlib import suppress
from pathlib import Path

from smallm.atomic_write import atomic_write
from smallm.training.data.source import Source

INDEX_FORMAT = 2
SETTLED_SECONDS = 2.0  # the longest tick of a file system's clock: a second change in one tick leaves no trace

Stamps = list[list]


def stamps(source: Source) -> Stamps | None:
    """What the file system says of each file, and says otherwise after a change; None if it does not say it."""
    if len(source.files) < len(source.parts):
        return None  # a text in memory
    try:
        status = [(str(file.resolve()), file.stat()) for file in source.files]
    except OSError:
        return None
    return [[path, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino, s.st_dev] for path, s in status]


def recall(cache: Path, source: Source) -> str | None:
    """The fingerprint of the text, if its files are as they were when it was remembered."""
    try:
        now = stamps(source)
        known = json.loads(_entry(cache, source, now).read_text(encoding="utf-8")) if now else {}
        return known["fingerprint"] if known["stamps"] == now else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def remember(cache: Path, source: Source, before: Stamps | None, fingerprint: str) -> None:
    """For the next time. `before`: the stamps as the reading began; a file that has changed since is not remembered."""
    with suppress(OSError):  # a cache that is only read is used all the same
        if not before or before != stamps(source) or not _settled(before):
            return
        entry = _entry(cache, source, before)
        entry.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(entry, json.dumps({"fingerprint": fingerprint, "stamps": before}))


def _settled(stamps: Stamps) -> bool:
    newest = max(max(mtime, ctime) for _, _, mtime, ctime, _, _ in stamps)
    return time.time() - newest / 1e9 > SETTLED_SECONDS


def _entry(cache: Path, source: Source, stamps: Stamps) -> Path:
    key = json.dumps([INDEX_FORMAT, source.encoding, source.tidy, *(path for path, *_ in stamps)])
    return cache / "sources" / f"{hashlib.sha256(key.encode()).hexdigest()}.json"
