"""Records of metrics.jsonl, and run folders that hold nothing else, for tests of what is read and drawn."""

import json
import math
from pathlib import Path

from smallm.training.report.history import RunHistory, read_histories


def train(step, loss=2.0, learning_rate=1e-3, epoch=None):
    epoch = step / 100 if epoch is None else epoch
    return {"kind": "train", "step": step, "epoch": epoch, "loss": loss, "learning_rate": learning_rate,
            "grad_norm": 0.8, "characters_per_second": 51000.0, "seconds": 3.2}  # fmt: skip


def evaluation(step, val_loss=2.1, train_loss=2.2):
    return {"kind": "eval", "step": step, "epoch": step / 100, "train_loss": train_loss, "val_loss": val_loss,
            "bits_per_character": val_loss and val_loss / math.log(2), "perplexity": val_loss and math.exp(val_loss),
            "seconds": 14.1, "sample": "To be\u2028or not: café"}  # fmt: skip


def write_run(folder: Path, records: list[dict], end: bytes = b"") -> Path:
    folder.mkdir(parents=True)
    lines = [json.dumps(record, ensure_ascii=False).encode() + b"\n" for record in records]
    (folder / "metrics.jsonl").write_bytes(b"".join(lines) + end)
    return folder


def falling(steps: int, floor: float = 1.5) -> list[dict]:
    """Records of a run that falls from 5.5 nats, most of it in the first twentieth."""
    loss = [floor + (5.5 - floor) * math.exp(-step / (0.01 * steps)) for step in range(steps)]
    evaluations = [evaluation(step, loss[step] + 0.1) for step in range(0, steps, 20)]
    return [train(step, loss[step]) for step in range(steps)] + evaluations


def read_history(folder: Path, records: list[dict]) -> RunHistory:
    """The history of a run with these records, which is written into a new folder."""
    return read_histories([write_run(folder, records)])[0]
