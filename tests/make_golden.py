"""Writes tests/golden.json, the vectors that every host has to give: python tests/make_golden.py

What the definition (smallm/embed/SAMPLING.md) decides is computed here by a second, slow reading of it, in plain Python
and without the sampler of smallm; the cases themselves are edited in golden.json. Twelve ids a case, with rng_seed 7
and a repetition window of 8, from logits that any host computes exactly.
"""

import json
import math
import struct
from collections.abc import Iterable
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("golden.json")


def mix(x: int) -> int:
    x = ((x ^ x >> 16) * 0x7FEB352D) % 2**32
    x = ((x ^ x >> 15) * 0x846CA68B) % 2**32
    return x ^ x >> 16


def draw(rng_seed: int, stream_number: int, i: int) -> int:
    """x_i, i = 1, 2, …"""
    return mix((mix((mix(rng_seed) + stream_number) % 2**32) + i * 0x9E3779B9) % 2**32)


def single(x: float) -> float:
    """x rounded to single precision."""
    return struct.unpack("f", struct.pack("f", x))[0]


def golden_logits(step: int) -> list[float]:
    """256 logits: multiples of 2**-21 from -4 to 4."""
    return [(mix(256 * step + id) >> 8) * 2.0**-21 - 4 for id in range(256)]


def apply_repetition_penalty(logits: list[float], ids: Iterable[int], penalty: float) -> list[float]:
    r, changed = single(penalty), list(logits)
    for id in ids:
        changed[id] = single(logits[id] / r if logits[id] > 0 else logits[id] * r)
    return changed


def first_kept(logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float) -> dict[int, float]:
    """The ids that are kept, by rank, and their weights: steps 4 to 8."""
    order = sorted(range(len(logits)), key=lambda id: (-logits[id], id))
    largest = logits[order[0]]
    kept = {id: math.exp((logits[id] - largest) / max(temperature, 1e-200)) for id in order[: top_k or None]}
    cumulative, share, total = 0.0, 0, sum_in_order(kept.values())
    if top_p < 1:
        while cumulative < top_p * total:
            cumulative += list(kept.values())[share]
            share += 1
    beginning = list(kept)[: share or None]
    return {id: kept[id] for id in beginning if kept[id] >= min_p}


def sum_in_order(weights: Iterable[float]) -> float:
    """One by one; Python's `sum` carries the rounding errors along."""
    total = 0.0
    for weight in weights:
        total += weight
    return total


def take(kept: dict[int, float], u: float) -> int:
    """The id that u takes: step 9."""
    total = sum_in_order(kept[id] for id in sorted(kept))
    cumulative = 0.0
    for id in sorted(kept):
        cumulative += kept[id]
        if cumulative > u * total:
            return id
    raise AssertionError(u)


def sample(logits: list[float], u: float, temperature: float, top_k: int, top_p: float, min_p: float) -> int:
    if temperature == 0:
        return logits.index(max(logits))
    return take(first_kept(logits, temperature, top_k, top_p, min_p), u)


def golden_ids(case: dict[str, Any]) -> list[int]:
    options = [case[name] for name in ("temperature", "top_k", "top_p", "min_p")]
    ids: list[int] = []
    for step in range(12):
        logits = apply_repetition_penalty(golden_logits(step % 3), ids[-8:], case["repetition_penalty"])
        ids.append(sample(logits, (draw(7, 0, step + 1) >> 8) / 2**24, *options))
    return ids


def allowed_ids(case: dict[str, Any]) -> list[int]:
    """The ids that may come after the bytes `after` of an unfinished character, of a vocabulary with these `tokens`."""
    spelled = [bytes([byte]) for byte in range(256)] + [bytes.fromhex(token) for token in case["tokens"].split()]
    after = bytes.fromhex(case["after"])
    return [id for id, bytes_ in enumerate(spelled) if may_come(after + bytes_, case["allowed"], case["banned"])]


def may_come(spelled: bytes, allowed: str | None, banned: str) -> bool:
    unfinished = next((spelled[-n:] for n in (3, 2, 1) if begins_character(spelled[-n:])), b"")
    completed = spelled[: len(spelled) - len(unfinished)].decode(errors="replace")
    if not all((allowed is None or c in allowed) and c not in banned for c in completed):
        return False
    return not unfinished or any(c not in banned for c in endings(unfinished, allowed))


@cache
def begins_character(spelled: bytes) -> bool:
    """Whether these bytes are an incomplete prefix of a character."""
    leads = 0 < len(spelled) < 4 and 0xC2 <= spelled[0] <= 0xF4
    return leads and len(spelled) < length(spelled[0]) and any(endings(spelled, None))


def length(lead: int) -> int:
    """Bytes of a character that begins with this one and is not ASCII."""
    return 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4


def endings(unfinished: bytes, allowed: str | None) -> Iterable[str]:
    """The characters that begin with these bytes."""
    if allowed is not None:
        yield from (c for c in allowed if c.encode().startswith(unfinished))
        return
    for end in product(range(0x80, 0xC0), repeat=length(unfinished[0]) - len(unfinished)):
        try:
            yield (unfinished + bytes(end)).decode()
        except UnicodeDecodeError:  # overlong, or a surrogate
            continue


def content(golden: dict[str, list[dict[str, Any]]]) -> str:
    """The content of the file for these cases, with new results; one case per line."""
    for case in golden["draws"]:
        case["x"] = [draw(case["rng_seed"], case["stream_number"], i) for i in range(1, 6)]
    for case in golden["ids"]:
        case["ids"] = golden_ids(case)
    for case in golden["allowed"]:
        case["ids"] = allowed_ids(case)
    parts = []
    for name, cases in golden.items():
        lines = ",\n".join("    " + json.dumps(case, ensure_ascii=False) for case in cases)
        parts.append(f'  "{name}": [\n{lines}\n  ]')
    return "{\n" + ",\n".join(parts) + "\n}\n"


if __name__ == "__main__":
    FILE.write_text(content(json.loads(FILE.read_text(encoding="utf-8"))), encoding="utf-8")
