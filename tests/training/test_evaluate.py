"""smallm.training.evaluate: passes of any size give the same loss, and the KV cache gives the text without one."""

import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from toys import TOY_VOCABULARY, random_model

from smallm.generation.rng import Rng
from smallm.generation.sampler import sample
from smallm.model_file.sampling import Sampling
from smallm.training import evaluate as evaluation
from smallm.training.config import OptimConfig
from smallm.training.evaluate import evaluate, ids_per_gpu_pass, sample_text
from smallm.training.model.operations import cross_entropy
from smallm.training.optim.optimizers import build_optimizer

IDS = np.random.default_rng(1).integers(0, 128, 5000).astype(np.uint16)


class FakeGPU:
    """A process of a run on GPUs, whose tensors are nevertheless on the CPU."""

    device = SimpleNamespace(type="cuda")

    def __init__(self, process_index=0, num_processes=1):
        self.process_index, self.num_processes = process_index, num_processes


@pytest.fixture
def gpu(monkeypatch):
    """Fakes the transfer and the reduction; returns the sums that the processes hand to the reduction."""
    reductions = []
    monkeypatch.setattr(evaluation, "to_device", lambda array, device: torch.from_numpy(array))
    monkeypatch.setattr(evaluation, "sum_over_processes", lambda accelerator, value: reductions.append(value) or value)
    return reductions


@pytest.mark.parametrize("processes", [1, 3])
def test_a_gpu_takes_large_passes_and_one_reduction(gpu, monkeypatch, processes):
    model, passes = random_model(), []
    cpu = SimpleNamespace(device=torch.device("cpu"), process_index=0, num_processes=1)
    expected = evaluate(cpu, model, IDS, len(IDS), 16)
    gpu.clear()
    model.register_forward_pre_hook(lambda module, args: passes.append(args[0].numel()))
    parts = [evaluate(FakeGPU(rank, processes), model, IDS, len(IDS), 16) for rank in range(processes)]
    assert sum(parts) == pytest.approx(expected, abs=1e-5)
    assert len(gpu) == processes
    assert len(passes) <= 2 * processes  # whole windows, and the rest
    passes.clear()
    monkeypatch.setattr(evaluation, "IDS_PER_READ", 1 << 10)
    monkeypatch.setattr(evaluation, "ids_per_gpu_pass", lambda vocab_size: 64)
    assert evaluate(FakeGPU(), model, IDS, len(IDS), 16) == pytest.approx(expected, abs=1e-5)
    assert max(passes) == 64


def test_signals_are_polled_between_some_passes_of_a_gpu(gpu, monkeypatch):
    monkeypatch.setattr(evaluation, "ids_per_gpu_pass", lambda vocab_size: 16)
    polls = []
    evaluate(FakeGPU(), random_model(), IDS, len(IDS), 16, lambda: polls.append(0) or 0)
    assert len(polls) == -(-(5000 // 16 + 1) // evaluation.GPU_PASSES_PER_SYNC)
    assert evaluate(FakeGPU(), random_model(), IDS, len(IDS), 16, lambda: 2) is None


@pytest.mark.parametrize(("accelerator", "limit"), [
    (SimpleNamespace(device=torch.device("cpu"), process_index=0, num_processes=1), 1),
    (FakeGPU(), evaluation.GPU_PASSES_PER_SYNC)])  # fmt: skip
def test_losses_of_passes_do_not_pile_up(gpu, monkeypatch, accelerator, limit):
    """Otherwise 200 MB of validation text took gigabytes: small blocks between large ones split the heap."""
    monkeypatch.setattr(evaluation, "IDS_PER_BATCH", 16)
    monkeypatch.setattr(evaluation, "ids_per_gpu_pass", lambda vocab_size: 16)
    alive, most = weakref.WeakSet(), []
    original = evaluation._sum_of_nats

    def watched(*args):
        loss = original(*args)
        alive.add(loss)
        most.append(len(alive))
        return loss

    monkeypatch.setattr(evaluation, "_sum_of_nats", watched)
    evaluate(accelerator, random_model(), IDS, len(IDS), 16)
    assert len(most) > 300
    assert max(most) <= limit + 1  # the one just made


def test_the_logits_of_a_pass_are_bounded():
    assert ids_per_gpu_pass(300) == 1 << 16
    assert ids_per_gpu_pass(16384) == 1 << 14
    assert ids_per_gpu_pass(1 << 20) == 8192


def without_cache(model, vocabulary, ids, length, sampling):
    """The definition of `sample_text`: the last block_size ids through the model for each new id."""
    rng, decoder, text, block_size = Rng(0), vocabulary.decoder(), "", model.config.block_size
    for _ in range(length):
        with torch.no_grad():
            logits = model(torch.tensor([ids[-block_size:]]))[0, -1]
        ids = [*ids, sample(logits.numpy(), rng.uniform(), sampling)]
        text += decoder.push(ids[-1])
    return text


@pytest.mark.parametrize("changes", [{}, {"window": 3}, {"n_kv_head": 0}, {"n_embd": 48, "n_head": 3, "n_kv_head": 1}])
@pytest.mark.parametrize("seed", ["a", "owls", "more than sixteen characters"])
def test_samples_with_a_cache_are_those_without(seed, changes):
    """Also past the context of 16 ids, and with widths that the CPU kernels take or refuse."""
    model = random_model(**changes)
    ids, passes = TOY_VOCABULARY.encode(seed).tolist(), []
    expected = without_cache(model, TOY_VOCABULARY, ids, 30, Sampling(0.8, 40))
    hook = model.register_forward_pre_hook(lambda module, args: passes.append(args[0].numel()))
    assert sample_text(model, TOY_VOCABULARY, ids, 30, 16, Sampling(0.8, 40)) == expected
    hook.remove()
    single = max(0, 16 - len(ids))
    assert passes == [min(len(ids), 16)] + [1] * single + [16] * (29 - single)


class WithoutFloat64(TorchDispatchMode):
    """A device as Apple's GPUs, which have no float64."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves((args, kwargs, result)):
            assert not (isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float64), function
        return result


@pytest.mark.parametrize("name", ["muon", "adamw", "adam"])
def test_training_evaluation_and_samples_need_no_float64(gpu, name):
    model = random_model(block_size=16)
    optimizer = build_optimizer(model, OptimConfig(name=name))
    ids = torch.from_numpy(IDS[:17].astype(np.int64))[None]
    with WithoutFloat64():
        cross_entropy(model(ids[:, :-1]), ids[:, 1:]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        assert evaluate(FakeGPU(), model, IDS, len(IDS), 16) > 0
        assert len(sample_text(model, TOY_VOCABULARY, [1], 20, 16, Sampling(temperature=0.8))) > 0


def test_the_device_without_float64_refuses_it():
    with pytest.raises(AssertionError), WithoutFloat64():
        torch.zeros(1).double()
