"""`smallm cache`: what the cache folder holds, by kind, and how to clear it."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from smallm.cli.arguments import ArgumentParser
from smallm.cli.table import short_count, table
from smallm.errors import UserError
from smallm.html.escape import printable
from smallm.runs.cache_folder import cache_folder

KINDS = {
    "texts": ("corpora", "sources", "locks"),
    "downloads": ("downloads", "hf"),
    "compiled": ("*.so",),
    "stdin": ("stdin",),
}
"""Kind -> the names in the cache folder: encoded texts with their statistics and baselines, texts that were
downloaded, compiled C, and texts from standard input, which their runs need to be resumed."""


def main(argv: Sequence[str]) -> int:
    """Runs `smallm cache` with these arguments."""
    parser = ArgumentParser("cache", description="Shows what the cache folder holds. All but the texts "
                            "from standard input is made or downloaded again when it is needed.")  # fmt: skip
    parser.add_argument("--clear", nargs="?", const="all", choices=("all", *KINDS), help="delete everything that can "
                        "be made again, or only one kind; no run must be training meanwhile")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print a JSON object; sizes in bytes, before --clear")
    options = parser.parse_args(argv)
    folder = cache_folder()
    entries = {kind: [path for name in names for path in folder.glob(name)] for kind, names in KINDS.items()}
    sizes = {kind: sum(map(_bytes_of, paths)) for kind, paths in entries.items()}
    if options.json:
        print(json.dumps({"folder": str(folder), "bytes": sizes, "cleared": options.clear}))
    else:
        rows = [[kind, f"{short_count(size)}B"] for kind, size in sizes.items()]
        print(printable(str(folder)), *table([*rows, ["all", f"{short_count(sum(sizes.values()))}B"]]), sep="\n")
    if options.clear:
        kinds = [kind for kind in KINDS if kind != "stdin"] if options.clear == "all" else [options.clear]
        _delete([path for kind in kinds for path in entries[kind]])
        if not options.json:
            print(f"deleted: {', '.join(kinds)}")
    return 0


def _bytes_of(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.lstat().st_size for file in files if file.is_file())


def _delete(paths: Sequence[Path]) -> None:
    """Deletes files and folders; links are not followed. Raises `UserError`."""
    try:
        for path in paths:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
    except OSError as error:
        raise UserError(f"cannot delete {error.filename}: {error.strerror}; close programs that use it") from None
