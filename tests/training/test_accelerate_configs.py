"""The files in configs/accelerate: Accelerate reads them, and cpu-2.yaml starts two processes."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "configs" / "accelerate"

# distributed_type, use_cpu, machines, processes, mixed_precision
EXPECTED = {
    "cpu": ("NO", True, 1, 1, "no"),
    "cpu-2": ("MULTI_GPU", True, 1, 2, "no"),
    "gpu": ("NO", False, 1, 1, "bf16"),
    "fsdp": ("FSDP", False, 1, 8, "bf16"),
    "multi-gpu": ("MULTI_GPU", False, 1, 8, "bf16"),
    "multi-node": ("MULTI_GPU", False, 2, 16, "bf16"),
}

SCRIPT = """
import json, sys
from pathlib import Path
import torch

from smallm.training.config import TrainConfig
from smallm.training.devices import build_accelerator

accelerator = build_accelerator(TrainConfig())
state = accelerator.state
total = accelerator.reduce(torch.tensor(accelerator.process_index + 1)).item()
facts = [state.num_processes, state.backend, state.device.type, total]
Path(sys.argv[1], f"{accelerator.process_index}.json").write_text(json.dumps(facts))
accelerator.end_training()
"""


def header(name: str) -> list[str]:
    lines = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    return [line.removeprefix("#").strip() for line in lines if line.startswith("#")]


def command(name: str) -> list[str]:
    """The one command in the file's header."""
    (line,) = [line for line in header(name) if "accelerate launch" in line]
    return shlex.split(line)


def test_every_config_is_tested():
    assert {path.stem for path in FOLDER.iterdir()} == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_accelerate_reads_it(name):
    from accelerate.commands.config import load_config_from_file

    config = load_config_from_file(str(FOLDER / f"{name}.yaml"))  # raises on unknown keys
    found = config.distributed_type, config.use_cpu, config.num_machines, config.num_processes, config.mixed_precision
    assert found == EXPECTED[name]
    assert config.num_machines == 1 or (config.main_process_ip and config.main_process_port)


@pytest.mark.parametrize("name", EXPECTED)
def test_header_tells_the_command(name):
    assert 2 <= len(header(name)) <= 4
    words = command(name)
    assert words[words.index("--config_file") + 1] == f"configs/accelerate/{name}.yaml"
    assert "train.py" in words


@pytest.mark.slow
def test_cpu_2_starts_two_processes(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    words = command("cpu-2")
    given = dict(word.split("=", 1) for word in words[: words.index("accelerate")])
    env = {key: value for key, value in os.environ.items() if not key.startswith(("ACCELERATE_", "RANK", "LOCAL_"))}
    launch = words[words.index("accelerate") + 1 : words.index("train.py")]
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.accelerate_cli", *launch, script, tmp_path],
        cwd=ROOT, env=env | given | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)] == [[2, "gloo", "cpu", 3]] * 2
    assert "had defaults used instead" not in done.stderr
