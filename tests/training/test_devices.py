"""smallm.training.devices: TF32, the time-out of collectives, and what a GPU can multiply; devices are faked."""

from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType

from smallm.errors import UserError
from smallm.training import cli, devices
from smallm.training.checkpoint.format import read_state
from smallm.training.checkpoint.manager import best_checkpoint
from smallm.training.config import TrainConfig
from smallm.training.devices import allow_tf32, build_accelerator, multiplies_bf16

CUDA = torch.device("cuda")


@pytest.fixture
def precision():
    """Restores PyTorch's setting of float32 matrix products."""
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(
    ("device", "capability", "before", "after"),
    [
        (CUDA, (8, 0), "highest", "high"),
        (CUDA, (9, 0), "medium", "medium"),  # set by the caller
        (CUDA, (7, 5), "highest", "highest"),
        (torch.device("cpu"), (0, 0), "highest", "highest"),
    ],
)
def test_tf32_is_on_where_the_gpu_has_it(precision, monkeypatch, device, capability, before, after):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    torch.set_float32_matmul_precision(before)
    allow_tf32(device)
    assert torch.get_float32_matmul_precision() == after


def test_devices_without_bf16_tensor_cores():
    assert not multiplies_bf16(torch.device("cpu"))
    assert not multiplies_bf16(torch.device("mps"))


def test_processes_wait_for_hours_for_the_one_that_encodes(monkeypatch):
    """The defaults of NCCL (10 minutes) and gloo (30 minutes) end runs on very large texts."""
    given = {}

    def recorded(*args, **options):
        given.update(options)
        return PartialState(*args, **options)

    monkeypatch.setattr(devices, "PartialState", recorded)
    build_accelerator(TrainConfig())
    assert given["timeout"] >= timedelta(hours=6)


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("no", None)])
def test_fsdp_on_cpus_computes_in_the_precision_of_the_run(monkeypatch, precision, dtype):
    state = SimpleNamespace()
    fake = SimpleNamespace(num_processes=1, device=torch.device("cpu"), state=state, is_fsdp2=True,
                           distributed_type=DistributedType.MULTI_CPU)  # fmt: skip
    monkeypatch.setattr(devices, "Accelerator", lambda **options: fake)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    build_accelerator(TrainConfig(mixed_precision=precision))
    assert state.distributed_type == DistributedType.FSDP
    policy = state.fsdp_plugin.mixed_precision_policy
    assert (policy and policy.param_dtype) == dtype


def test_a_resumed_run_keeps_its_precision_without_a_measurement(monkeypatch):
    """Where bf16 pays only sometimes, two starts could measure different answers."""
    monkeypatch.setattr(devices, "best_precision", lambda: pytest.fail("measured again"))
    assert build_accelerator(TrainConfig(), "no").mixed_precision == "no"
    assert build_accelerator(TrainConfig(), "bf16").mixed_precision == "bf16"
    assert build_accelerator(TrainConfig(mixed_precision="no"), "no").mixed_precision == "no"


def test_only_the_main_process_measures_the_precision(monkeypatch):
    """The other processes take its answer from the broadcast."""
    monkeypatch.setattr(devices, "best_precision", lambda: pytest.fail("measured"))
    monkeypatch.setattr(devices, "broadcast_from_main", lambda processes, index: (1.0,))
    other = SimpleNamespace(is_main_process=False, num_processes=2)
    assert devices._common_precision(other, "auto", "") == "bf16"


@pytest.fixture
def threads():
    """Sets the number of threads, and restores the number of before afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="for CPUs")
def test_a_resumed_run_keeps_its_number_of_threads(monkeypatch, threads, text_file, tmp_path):
    """The number of threads decides the order of sums."""
    argv = ["--model.n_layer=1", "--model.n_head=1", "--model.n_embd=32", "--model.block_size=8", "--train.max_steps=2",
            "--train.sample_length=0"]  # fmt: skip
    run = str(tmp_path / "run")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    threads(3)
    assert cli.main(["--data", str(text_file), "--out", run, *argv]) == 0
    threads(1)
    assert cli.main(["--resume", run, "--train.max_steps=3"]) == 0
    assert torch.get_num_threads() == read_state(best_checkpoint(Path(run)))[0].facts["threads"] == 3
    threads(1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert cli.main(["--resume", run, "--train.max_steps=4"]) == 0
    assert torch.get_num_threads() == 1


def test_a_host_without_an_address_is_one_line(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "first.machine.invalid")
    with pytest.raises(UserError, match=r"cannot meet at MASTER_ADDR = 'first\.machine\.invalid'.*--main_process_ip"):
        build_accelerator(TrainConfig())
