"""`smallm serve RUN`: serves a model to clients of OpenAI's completions API and to browsers."""

import os
from collections.abc import Sequence
from importlib.util import find_spec
from ipaddress import ip_address
from pathlib import Path

from smallm.cli.arguments import ArgumentParser
from smallm.errors import UserError, missing_package
from smallm.language_model import ENGINES, LanguageModel, find_model
from smallm.runs.layout import EXPORT
from smallm.serve.completion_request import Limits

TOKEN = "SMALLM_TOKEN"
LIMITS = Limits()


def main(argv: Sequence[str]) -> int:
    """Runs `smallm serve` with these arguments."""
    options = parser().parse_args(argv)
    token = options.token or os.environ.get(TOKEN)
    local = is_loopback(options.host)
    if not local and not token:
        raise UserError(f"--host {options.host} is open to other computers; give --token TOKEN, or set {TOKEN}")
    if not 0 <= options.port <= 65535:
        raise UserError(f"--port {options.port} is out of range; it must be from 0 to 65535")
    if min(options.max_length, options.max_requests, options.threads) < 1 or not options.deadline > 0:
        raise UserError("--max-length, --max-requests, --threads and --deadline must be positive")
    missing = [name for name in ("starlette", "uvicorn") if find_spec(name) is None]
    if missing:
        raise missing_package("serve", missing[0], "serve")
    import uvicorn

    from smallm.serve.app import build_app
    from smallm.serve.connection import Connection
    from smallm.serve.generation_queue import GenerationQueue

    file = find_model(options.run)
    limits = Limits(max_length=options.max_length, max_requests=options.max_requests, deadline=options.deadline)
    with LanguageModel.load(file, threads=1, engine=options.engine) as model:
        app = build_app(GenerationQueue(model, limits, options.threads), file, options.name or model_name(file),
                        token, options.allow_origin, ["localhost", "127.0.0.1", "["] if local else None)  # fmt: skip
        uvicorn.run(app, host=options.host, port=options.port, log_level="info", access_log=False,
                    server_header=False, http=Connection, ws="none", timeout_keep_alive=10,
                    timeout_graceful_shutdown=3)  # fmt: skip
    return 0


def parser() -> ArgumentParser:
    """The options of `smallm serve`."""
    parser = ArgumentParser("serve", description="Serves an exported model: POST /v1/completions for "
                            "clients of OpenAI's API, and a web page at /. Ctrl-C ends the server.")  # fmt: skip
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="a run that was exported, an export folder or an .onnx file")
    add("--host", default="127.0.0.1", help="address to listen on; others than loopback need a token (default: "
        "127.0.0.1)")  # fmt: skip
    add("--port", type=int, default=8000, help="port; 0 = one that is free (default: 8000)")
    add("--token", help=f"what clients must send as their API key; default: {TOKEN}, otherwise nothing")
    add("--engine", choices=ENGINES, default="onnxruntime", help="what generates text (default: onnxruntime)")
    add("--threads", type=int, default=os.cpu_count() or 1, metavar="N", help="texts that are computed at the same "
        "time (default: the number of cores)")  # fmt: skip
    add("--name", help="name of the model for clients; default: the name of the run")
    add("--allow-origin", metavar="ORIGIN", help="web origin whose pages may use the server, such as "
        "https://example.org; * = all; default: none")  # fmt: skip
    add("--max-length", type=int, default=LIMITS.max_length, metavar="N", help="characters that one text may ask for "
        f"(default: {LIMITS.max_length})")  # fmt: skip
    add("--max-requests", type=int, default=LIMITS.max_requests, metavar="N", help="requests that are answered at the "
        f"same time; further ones get status 503 (default: {LIMITS.max_requests})")  # fmt: skip
    add("--deadline", type=float, default=LIMITS.deadline, metavar="SECONDS", help="time for one request (default: "
        f"{LIMITS.deadline:g})")  # fmt: skip
    return parser


def is_loopback(host: str) -> bool:
    """Whether only programs of this computer reach this address."""
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def model_name(file: Path) -> str:
    """The name of the run or folder that holds a model file."""
    folder = file.resolve().parent
    return folder.parent.name if folder.name == EXPORT else folder.name
