"""smallm.training.model.compilation: when to compile, one graph per shape, one warning where compilation fails."""

from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from toys import random_model

from smallm.training.model import compilation
from smallm.training.model.compilation import compile_model, should_compile

GPU, CPU = torch.device("cuda"), torch.device("cpu")
PASS = 64 * 256 * 68e6  # FLOPs of configs/shakespeare-gpu.toml


@pytest.fixture
def triton(monkeypatch):
    """Pretends that triton is installed; `triton(False)` pretends that triton is missing."""

    def there(is_there):
        monkeypatch.setattr(compilation, "find_spec", lambda name: object() if is_there else None)

    there(True)
    return there


@pytest.mark.parametrize(
    ("choice", "device", "passes", "flops", "n_layer", "expected"),
    [
        ("auto", GPU, 5000, PASS, 6, True),
        ("auto", GPU, 2000, PASS, 6, False),  # 74 s
        ("auto", GPU, 119_000, 1e6, 3, False),  # so small that launching kernels takes most of the time
        ("auto", GPU, 121_000, 1e6, 3, True),
        ("auto", GPU, 0, PASS, 6, False),
        ("auto", CPU, 10**9, PASS, 6, False),
        ("auto", torch.device("mps"), 10**9, PASS, 6, False),
        ("yes", CPU, 1, 1.0, 1, True),
        ("yes", GPU, 1, 1.0, 1, True),
        ("no", GPU, 10**9, PASS, 6, False),
    ],
)
def test_auto_is_for_long_runs_on_a_gpu(triton, choice, device, passes, flops, n_layer, expected):
    assert should_compile(choice, device, passes, flops, n_layer) is expected


def test_auto_needs_triton(triton):
    triton(False)
    assert not should_compile("auto", GPU, 10**9, PASS, 6)
    assert should_compile("yes", GPU, 10**9, PASS, 6)  # the failure is then reported


@pytest.fixture
def batches():
    ids = torch.randint(0, 256, (2, 17), generator=torch.Generator().manual_seed(1))
    return [(ids[:, :T], ids[:, 1 : T + 1]) for T in (4, 8, 16)]


@pytest.fixture
def said():
    return []


def test_each_shape_gets_one_graph(monkeypatch, batches, said):
    """Traces for real, but generates no code, which would take a minute."""
    from torch._dynamo.testing import CompileCounter  # takes two seconds

    graphs = CompileCounter()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=graphs, fullgraph=True))
    model = random_model().train()
    before = {name: p.clone() for name, p in model.named_parameters()}
    fast = compile_model(model, Accelerator(cpu=True), batches, said.append)
    assert graphs.frame_count == 3
    for ids, _ in batches[::-1]:
        torch.testing.assert_close(fast(ids), model(ids), rtol=0, atol=1e-4)
    assert graphs.frame_count == 3
    assert said == ["compiling the model, which can take a minute"]
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None


@pytest.mark.parametrize(("kind", "local"), [(DistributedType.FSDP, 0), (DistributedType.MULTI_GPU, 1)])
def test_the_warm_up_of_sharded_models_synchronises_gradients(monkeypatch, batches, said, kind, local):
    """Without synchronisation FSDP2 keeps the gradients of the warm-up and adds them to those of the first step."""
    calls = []

    def no_sync(model):
        calls.append(model)
        return nullcontext()

    monkeypatch.setattr(torch, "compile", lambda model, **options: model)
    compile_model(random_model(), SimpleNamespace(distributed_type=kind, no_sync=no_sync), batches, said.append)
    assert len(calls) == local


class FailsBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise RuntimeError("no working\ncompiler")


@pytest.mark.parametrize("where", ["at once", "forward", "backward"])
def test_a_failed_compilation_leaves_the_model_unchanged(monkeypatch, batches, said, where):
    def broken(model, **options):
        if where == "at once":
            raise RuntimeError("no working\ncompiler")
        return lambda ids: FailsBackward.apply(model(ids))

    def failing(graph, example_inputs):
        raise RuntimeError("no working\ncompiler")

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=failing) if where == "forward" else broken)
    model = random_model().train()
    assert compile_model(model, Accelerator(cpu=True), batches, said.append) is model
    assert len(said) == 2
    assert said[1].startswith("warning: torch.compile does not work here (RuntimeError: no working); ")
    assert "\n" not in said[1]
    assert all(p.grad is None for p in model.parameters())


def test_ctrl_c_is_not_treated_as_a_failure(monkeypatch, batches, said):
    def interrupted(model, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "compile", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compile_model(random_model(), Accelerator(cpu=True), batches, said.append)
