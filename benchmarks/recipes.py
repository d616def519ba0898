"""Compares variants of a config at equal compute on three texts of different kinds: which changes lower the loss?

    python benchmarks/recipes.py --config speedrun --results FILE --variant NAME SETTING=VALUE … [--variant …]
    python benchmarks/recipes.py --config shakespeare-cpu --results decay.jsonl \\
        --variant "decay 0.3" optim.weight_decay=0.3 --variant wide model.n_embd=160 model.n_head=5

Every run has the floating-point operations of the unchanged config: a variant with a larger model or batch, or with
teachers (train.ensemble), makes fewer steps. A forward pass of a teacher counts as a third of a step. The time of a run
therefore does not matter, and the machine may be busy. The gain of a variant is the loss of the unchanged config minus
that of the variant with the same seed, in nats per character. A variant pays if every seed gains on every text.

The texts are Shakespeare (the training part of `--data shakespeare`; the validation text of that config is never
read), Python sources (the standard library of this Python) and translated manual pages (`--manuals`; the default
needs Debian's package manpages-ja). Of each text a run learns the first `--characters`, and the last 50,000 judge.

Each run appends a line of JSON to FILE. Interrupted series go on, and lines of another config or length are ignored.
"""

import argparse
import gzip
import hashlib
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from statistics import fmean

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout need not be installed

from smallm.cli.main import run
from smallm.cli.table import table
from smallm.errors import UserError
from smallm.runs.summary import read_run
from smallm.training.cli import parse
from smallm.training.config import Config, DataConfig
from smallm.training.data.corpus import open_corpus
from smallm.training.model.transformer import TransformerLanguageModel
from smallm.training.optim.schedule import mean_step_cost, total_steps

ROOT = Path(__file__).resolve().parents[1]
JUDGE = 50_000  # characters at the end of each text
VOCABULARY = 128  # a typical size, to count operations
TEXTS = ("shakespeare", "python", "manuals")
BASE = "unchanged"
Results = dict[tuple[str, str, int], float]
"""(variant, text, seed) -> loss in nats per character."""


def build_text(name: str, characters: int, manuals: Path) -> str:
    """`characters` to learn from the start of a text, and JUDGE from its end."""
    if name == "shakespeare":
        corpus = open_corpus(DataConfig("shakespeare"), progress=False)
        text = corpus.vocabulary.decode(corpus.train_ids[:])
    elif name == "python":
        text = _joined(Path(sysconfig.get_path("stdlib")).glob("*.py"), 2 * characters + JUDGE)
    else:
        text = _joined(manuals.glob("man*/*.gz"), 2 * characters + JUDGE)
    if len(text) < characters + JUDGE:
        raise UserError(f"the text {name} has {len(text):,} characters, fewer than --characters plus {JUDGE:,}")
    return text[:characters] + text[-JUDGE:]


def _joined(files: Iterable[Path], characters: int) -> str:
    """The contents of files in the order of a hash of their names, which mixes the subjects."""
    text = ""
    for file in sorted(files, key=lambda file: hashlib.sha256(file.name.encode()).digest()):
        content = file.read_bytes()
        text += (gzip.decompress(content) if file.suffix == ".gz" else content).decode(errors="replace")
        if len(text) >= characters:
            break
    return text[:characters]


def parse_config(config: str, flags: Sequence[str]) -> Config:
    """A config with the settings in flags of train.py."""
    return parse(["--config", config, *flags]).config


def operations_per_step(config: Config) -> float:
    """Floating-point operations of a mean step in windows of full length, with the forward passes of teachers."""
    ids = config.train.batch_size * config.model.block_size
    flops = ids * TransformerLanguageModel(VOCABULARY, config.model).flops_per_id()
    return flops * mean_step_cost(config.train.ensemble)


def train(text: Path, flags: Sequence[str]) -> float:
    """The loss of the best checkpoint of a run, in a separate process of one thread."""
    with tempfile.TemporaryDirectory(prefix="smallm-") as folder:
        command = [sys.executable, str(ROOT / "train.py"), *flags, "--data", str(text), "--out", folder]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        loss = None if done.returncode else read_run(Path(folder)).val_loss
    if loss is None:
        raise UserError(f"{' '.join(flags)}: {done.stderr.strip()[-500:]}")
    return loss


def run_all(options: argparse.Namespace, home: Path) -> Results:
    """Trains whatever FILE does not hold yet, `--jobs` runs at a time, and returns all losses."""
    base = parse_config(options.config, [])
    steps = options.steps or total_steps(base.train.max_steps, 0, 1)
    variants = {BASE: [], **options.variants}
    lengths = {name: round(steps * operations_per_step(base) / operations_per_step(parse_config(options.config, flags)))
               for name, flags in variants.items()}  # fmt: skip
    files = {name: home / f"{name}.txt" for name in options.texts}
    for name, file in files.items():
        file.write_text(build_text(name, options.characters, options.manuals), encoding="utf-8", newline="")
    val_fraction = JUDGE / (options.characters + JUDGE)
    known = _known(options.results)

    def measure(key: tuple[str, str, int]) -> float:
        variant, text, seed = key
        flags = ["--config", options.config, *variants[variant], f"--train.seed={seed}", "--train.epochs=0",
                 f"--train.max_steps={lengths[variant]}", "--train.eval_every=1000000", "--train.sample_length=0",
                 "--train.mixed_precision=no", f"--data.val_fraction={val_fraction:.6f}"]  # fmt: skip
        digest = hashlib.sha256(files[text].read_bytes()).hexdigest()[:16]
        name = " ".join([text, digest, *flags])
        if name not in known:
            known[name] = train(files[text], flags)
            line = json.dumps({"variant": variant, "loss": known[name], "run": name})
            with options.results.open("a", encoding="utf-8") as file:
                file.write(f"\n{line}\n")  # on its own line, also after one that was cut off
            print(f"recipes: {variant}, {text}, seed {seed}: {known[name]:.4f}", file=sys.stderr, flush=True)
        return known[name]

    keys = [(v, t, s) for s in options.seeds for v in variants for t in options.texts]  # a whole table early
    with ThreadPoolExecutor(options.jobs) as pool:
        return dict(zip(keys, pool.map(measure, keys), strict=True))


def _known(results: Path) -> dict[str, float]:
    """Run -> loss, from the lines of FILE; the last line may have been cut off."""
    losses = {}
    for line in results.read_text(encoding="utf-8").splitlines() if results.exists() else []:
        with suppress(json.JSONDecodeError):
            record = json.loads(line)
            losses[record["run"]] = record["loss"]
    return losses


def format_table(losses: Results, texts: Sequence[str], seeds: Sequence[int]) -> str:
    """For each variant and text the mean gain and half the range over the seeds, then the verdict."""
    cells = [["gain in nats", *texts, "pays"]]
    for variant in dict.fromkeys(v for v, _, _ in losses if v != BASE):
        gains = [[losses[BASE, t, s] - losses[variant, t, s] for s in seeds] for t in texts]
        pays = "yes" if min(map(min, gains)) > 0 else "no"
        cells.append([variant, *(f"{fmean(g):+.4f} ± {(max(g) - min(g)) / 2:.4f}" for g in gains), pays])
    base = [f"{fmean(losses[BASE, t, s] for s in seeds):.4f}" for t in texts]
    return "\n".join(table([*cells, [f"loss, {BASE}", *base, ""]]))


def main(argv: Sequence[str]) -> int:
    """Trains all runs and prints the table."""
    options = parse_options(argv)
    with tempfile.TemporaryDirectory(prefix="smallm-") as home:
        losses = run_all(options, Path(home))
    print(format_table(losses, options.texts, options.seeds))
    return 0


def parse_options(argv: Sequence[str]) -> argparse.Namespace:
    """Parses the command line; `variants` maps the name of each variant to flags of train.py."""
    parser = argparse.ArgumentParser(prog="recipes.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--config", default="speedrun", help="the unchanged config (default: %(default)s)")
    add("--steps", type=int, default=0, metavar="N", help="its number of steps (default: that of the config)")
    add("--variant", nargs="+", action="append", default=[], metavar=("NAME", "SETTING=VALUE"),
        help="a name and the settings that differ from the config; may be repeated")  # fmt: skip
    add("--results", type=Path, default=Path("recipes.jsonl"), metavar="FILE",
        help="the losses, one line a run; losses in it are not measured again (default: %(default)s)")  # fmt: skip
    add("--texts", nargs="+", choices=TEXTS, default=TEXTS, help="default: all")
    add("--characters", type=int, default=250_000, metavar="N", help="length to learn (default: %(default)s)")
    add("--manuals", type=Path, default=Path("/usr/share/man/ja"), metavar="DIR",
        help="folder with the sections man1, man2, … of translated manual pages (default: %(default)s)")  # fmt: skip
    add("--seeds", nargs="+", type=int, default=[1, 2], metavar="N", help="default: 1 2")
    add("--jobs", type=int, default=1, metavar="N", help="runs at the same time, each of one thread (default: 1)")
    options = parser.parse_args(argv)
    options.variants = {name: [f"--{setting}" for setting in settings] for name, *settings in options.variant}
    return options


if __name__ == "__main__":
    raise SystemExit(run(main))
