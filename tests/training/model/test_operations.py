"""smallm.training.model.operations: the kernels give the results of plain PyTorch and autograd."""

import ctypes
import sys

import pytest
import torch

from smallm.inference import compiler
from smallm.training.config import ModelConfig
from smallm.training.model import operations, transformer
from smallm.training.model.kernels import loader as kernels
from smallm.training.model.transformer import TransformerBlock, TransformerLanguageModel
from smallm.training.optim.optimizers import POLAR_EXPRESS


@pytest.fixture(autouse=True)
def _compiled():
    if kernels.load() is None:
        pytest.skip("this machine has no C compiler with OpenMP")


@pytest.fixture
def plain(monkeypatch):
    """Calls a function with the kernels switched off."""

    def call(function, *arguments):
        with monkeypatch.context() as patch:
            for module in (operations, transformer):
                patch.setattr(module, "cpu_kernels", lambda x: None)
            return function(*arguments)

    return call


def numbers(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def shaken(module, seed=2):
    """The module with all weights changed a little: exact zeros and ones hide mistakes."""
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.1 * numbers(*p.shape, seed=seed))
    return module


def outcome(function, inputs, seed=9):
    """Result, and the gradients of all inputs of a randomly weighted sum of the result."""
    inputs = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]
    y = function(*inputs)
    wanted = [x for x in inputs if x.requires_grad]
    return [y, *torch.autograd.grad((y * numbers(*y.shape, seed=seed).to(y.dtype)).sum(), wanted)]


def assert_close(ours, plains, tolerance=2e-5):
    for number, (a, b) in enumerate(zip(ours, plains, strict=True)):
        error = (a.double() - b.double()).abs().max() / b.abs().max().clamp(min=0.1)
        assert error < tolerance, f"tensor {number}: {error:.1e}"


@pytest.mark.parametrize(
    ("n_head", "n_kv_head", "n_embd", "n_inner", "B", "T"),
    [(1, 0, 32, 64, 2, 16), (3, 0, 96, 0, 2, 33), (4, 2, 128, 32, 3, 64), (4, 1, 64, 96, 1, 70), (2, 0, 128, 0, 2, 40),
     (2, 0, 96, 32, 5, 1)],
)  # fmt: skip
def test_a_block_equals_plain_pytorch(plain, n_head, n_kv_head, n_embd, n_inner, B, T):
    config = ModelConfig(n_head=n_head, n_kv_head=n_kv_head, n_embd=n_embd, n_inner=n_inner, block_size=T)
    whole = shaken(TransformerLanguageModel(40, config, seed=1))
    block, x, tables = whole.h[0], numbers(B, T, n_embd, seed=3), whole.rotary(T)
    assert block.fits_kernels

    def run(x, *parameters):
        names = [name for name, _ in block.named_parameters()]
        return torch.func.functional_call(block, dict(zip(names, parameters, strict=True)), (x, *tables))

    ours = outcome(run, [x, *block.parameters()])
    assert_close(ours, plain(outcome, run, [x, *block.parameters()]))
    tables = [t.double() for t in tables]
    assert_close(ours, outcome(run, [t.double() for t in (x, *block.parameters())]))


@pytest.mark.parametrize(("window", "T"), [(2, 40), (7, 70), (32, 100), (33, 100), (64, 100), (90, 70)])
def test_a_block_with_a_window(plain, window, T):
    config = ModelConfig(n_head=4, n_kv_head=2, n_embd=128, n_inner=32, block_size=128, window=window)
    whole = shaken(TransformerLanguageModel(40, config, seed=1))
    block, x, tables = whole.h[0], numbers(2, T, 128, seed=3), whole.rotary(T)

    def run(x, *parameters):
        names = [name for name, _ in block.named_parameters()]
        return torch.func.functional_call(block, dict(zip(names, parameters, strict=True)), (x, *tables))

    inputs = [x, *block.parameters()]
    assert_close(outcome(run, inputs), plain(outcome, run, inputs))


def test_a_block_whose_widths_do_not_fit_uses_plain_pytorch(monkeypatch):
    config = ModelConfig(n_head=3, n_embd=48, block_size=8)
    block = TransformerBlock(config)
    assert not block.fits_kernels
    monkeypatch.setattr(transformer, "block", None)  # would fail if it were called
    whole = TransformerLanguageModel(40, config, seed=1)
    assert torch.isfinite(whole(torch.zeros(1, 8, dtype=torch.long))).all()


def test_rms_norm(plain):
    inputs = [numbers(3, 5, 64, seed=1) * 3, numbers(64, seed=2)]
    assert_close(outcome(operations.rms_norm, inputs), plain(outcome, operations.rms_norm, inputs))


@pytest.mark.parametrize("V", [3, 16, 65, 256, 300])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_cross_entropy(plain, V, reduction):
    logits, targets = numbers(2, 7, V, seed=1) * 20, torch.arange(14).view(2, 7) % V
    targets[0, 3] = targets[1, 6] = -1

    def run(logits):
        return operations.cross_entropy(logits, targets, reduction)

    assert_close(outcome(run, [logits]), plain(outcome, run, [logits]))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_values_are_preserved(bad):
    """Otherwise a diverged run would go unnoticed."""
    logits = numbers(1, 4, 64, seed=1)
    logits[0, 2, 5] = bad
    assert not torch.isfinite(operations.cross_entropy(logits, torch.zeros(1, 4, dtype=torch.long)))
    whole = TransformerLanguageModel(40, ModelConfig(n_head=1, n_embd=32, block_size=8), seed=1)
    with torch.no_grad():
        shaken(whole).h[0].attn.c_attn.weight[3, 4] = bad
    assert not torch.isfinite(whole(torch.ones(1, 8, dtype=torch.long))).all()


@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 64, 96), (5, 96, 256)])
def test_polynomial_iteration(plain, shape):
    x = numbers(*shape, seed=1)
    x = x / x.norm(dim=(1, 2), keepdim=True)
    before = x.clone()
    ours = operations.polynomial_iteration(x, POLAR_EXPRESS[:4])
    assert torch.equal(x, before)
    assert_close([ours], [plain(operations.polynomial_iteration, x, POLAR_EXPRESS[:4])])


@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 64, 96), (5, 96, 256)])
def test_polynomial_iteration_in_bf16_products(plain, monkeypatch, shape):
    monkeypatch.setattr(operations, "has_bf16", lambda: True)
    x = numbers(*shape, seed=1)
    x = x / x.norm(dim=(1, 2), keepdim=True)
    ours = operations.polynomial_iteration(x, POLAR_EXPRESS[:3], bf16=True)
    exact, gpu = (plain(operations.polynomial_iteration, y, POLAR_EXPRESS[:3]) for y in (x.double(), x.bfloat16()))
    error, error_on_a_gpu = (((y - exact).norm() / exact.norm()).item() for y in (ours, gpu))
    assert 1e-3 < error < min(0.03, 1.1 * error_on_a_gpu)


def dropped_block(p):
    config = ModelConfig(n_head=2, n_embd=64, block_size=32, dropout=p)
    whole = shaken(TransformerLanguageModel(40, config, seed=1))
    return whole.h[0], whole.rotary(32), numbers(64, 32, 64, seed=3)


def test_dropout_drops_the_given_fraction_and_keeps_the_mean():
    block, tables, x = dropped_block(0.25)
    with torch.no_grad():
        block.mlp.c_proj.weight.zero_()  # so that only the dropout after attention has an effect
        torch.manual_seed(5)
        added = block(x, *tables) - x
        full = block.eval()(x, *tables) - x
    gone = added.abs() < 1e-6
    assert gone.float().mean() == pytest.approx(0.25, abs=0.005)
    for axis in range(3):  # no row, column or sequence is favoured
        others = [a for a in range(3) if a != axis]
        assert gone.float().mean(others).sub(0.25).abs().max() < 0.05
    torch.testing.assert_close(added[~gone], full[~gone] / 0.75, rtol=1e-4, atol=1e-5)


def test_dropout_depends_on_the_seed_alone():
    block, tables, x = dropped_block(0.5)
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(block(x, *tables))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_the_gradient_uses_the_mask_of_the_forward_pass():
    """Finite differences along a random direction, with one mask."""
    block, tables, x = dropped_block(0.5)
    weight, direction = numbers(*x.shape, seed=4), numbers(*x.shape, seed=5)

    def loss(x):
        torch.manual_seed(1)
        return (block(x, *tables).double() * weight).sum()

    x.requires_grad_()
    (gradient,) = torch.autograd.grad(loss(x), x)
    with torch.no_grad():
        slope = (loss(x + 1e-2 * direction) - loss(x - 1e-2 * direction)) / 2e-2
    assert slope.item() == pytest.approx((gradient * direction).sum().item(), rel=2e-3)


def test_the_kernels_serve_float32_and_bf16_autocast_only(monkeypatch):
    x = torch.zeros(1, 32)
    assert operations.cpu_kernels(x) is not None
    assert operations.cpu_kernels(x.double()) is None
    assert operations.cpu_kernels(x.to("meta")) is None
    monkeypatch.setattr(operations, "has_bf16", lambda: False)
    with torch.autocast("cpu", torch.bfloat16):
        assert operations.cpu_kernels(x) is None
    monkeypatch.setattr(operations, "has_bf16", lambda: True)
    with torch.autocast("cpu", torch.bfloat16):
        assert operations.cpu_kernels(x) is kernels.load(bf16=True)
    with torch.autocast("cpu", torch.float16):
        assert operations.cpu_kernels(x) is None


def rounded(x):
    """x rounded to bf16."""
    return x.bfloat16().float()


@pytest.mark.parametrize(
    ("n_kv_head", "n_embd", "B", "T"), [(0, 64, 2, 16), (1, 96, 1, 7), (0, 32, 3, 23), (0, 64, 5, 33)]
)
def test_a_block_in_bf16_products(monkeypatch, n_kv_head, n_embd, B, T):
    """Processors without bf16 instructions compute the same products in another way."""
    monkeypatch.setattr(operations, "has_bf16", lambda: True)
    config = ModelConfig(n_head=n_embd // 32, n_kv_head=n_kv_head, n_embd=n_embd, block_size=T)
    whole = shaken(TransformerLanguageModel(40, config, seed=1))
    block, x, tables = whole.h[0], numbers(B, T, n_embd, seed=3), whole.rotary(T)
    names = [name for name, _ in block.named_parameters()]

    def run(x, *parameters):
        return torch.func.functional_call(block, dict(zip(names, parameters, strict=True)), (x, *tables))

    def run_bf16(*inputs):
        with torch.autocast("cpu", torch.bfloat16):
            return run(*inputs)

    inputs = [x, *block.parameters()]
    ours, exact = outcome(run_bf16, inputs), outcome(run, inputs)
    for name, a, b in zip(["y", "x", *names], ours, exact, strict=True):
        assert a.dtype == torch.float32
        off = ((a - b).norm() / b.norm()).item()
        assert 1e-5 < off < 0.02, (name, off)


def test_the_definition_of_bf16_products(monkeypatch):
    """A single product: operands rounded to nearest, ties to even, and summed in float32."""
    monkeypatch.setattr(operations, "has_bf16", lambda: True)
    whole = TransformerLanguageModel(40, ModelConfig(n_head=1, n_embd=32, n_inner=32, block_size=8), seed=1)
    block = whole.h[0]
    with torch.no_grad():
        block.attn.c_proj.weight.zero_()  # the first half adds nothing
        block.mlp.c_fc.weight.normal_(generator=torch.Generator().manual_seed(1))
        block.mlp.c_proj.weight.copy_(torch.eye(32))
        block.mlp.c_proj.weight[3, 3] = 1 + 2**-8  # halfway between two numbers of bf16: to the even one, 1
        block.mlp.c_proj.weight[4, 4] = 1 + 3 * 2**-8  # to 1 + 2^-6
    x, tables = numbers(1, 8, 32, seed=3), whole.rotary(8)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        y = block(x, *tables) - x
    h = rounded(torch.nn.functional.rms_norm(x, (32,), block.ln_2.weight, operations.NORM_EPS))
    gate, up = (h @ rounded(block.mlp.c_fc.weight).mT).chunk(2, -1)
    wanted = rounded(torch.nn.functional.silu(gate) * up)
    wanted[..., 4] *= 1 + 2**-6
    off = (y - wanted).abs().flatten()
    assert off.median() < 1e-6  # a few operands round the other way
    assert (off > 1e-5).float().mean() < 0.1
    assert off.max() < 0.02


def test_non_finite_values_are_preserved_in_bf16(monkeypatch):
    monkeypatch.setattr(operations, "has_bf16", lambda: True)
    whole = TransformerLanguageModel(40, ModelConfig(n_head=1, n_embd=32, block_size=8), seed=1)
    with torch.no_grad():
        shaken(whole).h[0].attn.c_attn.weight.view(torch.int32)[3, 4] = 0x7FFFFFFF  # NaN; rounding overflows
    with torch.autocast("cpu", torch.bfloat16):
        assert not torch.isfinite(whole(torch.ones(1, 8, dtype=torch.long))).all()


def test_a_run_in_bf16_products(monkeypatch, text_file, tmp_path):
    from accelerate.state import AcceleratorState

    from smallm.training import cli
    from smallm.training.checkpoint.format import read_state
    from smallm.training.checkpoint.manager import checkpoints

    def loss(precision):
        AcceleratorState._reset_state(reset_partial_state=True)  # the process had another precision before
        argv = ["--model.n_layer=2", "--model.n_head=1", "--model.n_embd=32", "--model.block_size=16",
                "--train.max_steps=30", "--train.sample_length=0", f"--train.mixed_precision={precision}"]  # fmt: skip
        assert cli.main(["--data", str(text_file), "--out", str(tmp_path / precision), *argv]) == 0
        return read_state(checkpoints(tmp_path / precision)[-1])[0].best_val_loss

    monkeypatch.setattr(operations, "has_bf16", lambda: True)
    half, full = loss("bf16"), loss("no")
    assert half == pytest.approx(full, abs=0.02)
    assert half != full


def test_bf16_is_chosen_only_where_it_measures_faster(monkeypatch):
    from smallm.training import precision

    monkeypatch.setattr(precision, "bf16_is_faster", precision.bf16_is_faster.__wrapped__)  # measures anew at each call
    monkeypatch.setattr(precision, "has_bf16", lambda: False)
    assert precision.best_precision() == "no"
    monkeypatch.setattr(precision, "has_bf16", lambda: True)
    monkeypatch.setattr(operations, "has_bf16", lambda: True)
    monkeypatch.setattr(precision, "MAX_BF16_TIME", 0.0)
    assert precision.best_precision() == "no"
    monkeypatch.setattr(precision, "MAX_BF16_TIME", 1e9)
    assert precision.best_precision() == "bf16"
    monkeypatch.setattr(precision, "load", lambda bf16: None)
    assert precision.best_precision() == "no"


@pytest.mark.parametrize("n_kv_head", [0, 2])
def test_the_whole_model_has_equal_loss_and_gradients(plain, n_kv_head):
    config = ModelConfig(n_layer=2, n_head=4, n_kv_head=n_kv_head, n_embd=64, block_size=48)
    whole = shaken(TransformerLanguageModel(256, config, seed=1))
    ids = torch.randint(0, 256, (3, 49), generator=torch.Generator().manual_seed(3))

    def run():
        whole.zero_grad()
        logits = whole(ids[:, :-1])
        operations.cross_entropy(logits, ids[:, 1:]).backward()
        return [logits.detach(), *(p.grad.clone() for p in whole.parameters())]

    assert_close(run(), plain(run), tolerance=5e-5)


def test_the_number_of_threads_does_not_change_the_result():
    config = ModelConfig(n_layer=1, n_head=2, n_embd=64, block_size=32)
    whole = shaken(TransformerLanguageModel(256, config, seed=1))
    ids = torch.randint(0, 256, (5, 33), generator=torch.Generator().manual_seed(3))
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            whole.zero_grad()
            operations.cross_entropy(whole(ids[:, :-1]), ids[:, 1:]).backward()
            results.append([p.grad.clone() for p in whole.parameters()])
    finally:
        torch.set_num_threads(before)
    for others in results[1:]:
        assert_close(others, results[0])


def test_without_a_compiler_training_works_and_prints_a_warning(monkeypatch, text_file, tmp_path, capsys):
    from smallm.training import cli

    monkeypatch.setattr(kernels, "load", lambda bf16=False: None)
    monkeypatch.setattr(operations, "load", lambda bf16=False: None)
    argv = ["--model.n_layer=1", "--model.n_head=1", "--model.n_embd=32", "--model.block_size=8", "--train.max_steps=2"]
    assert cli.main(["--data", str(text_file), "--out", str(tmp_path / "run"), *argv]) == 0
    assert capsys.readouterr().err.count("apt install gcc") == 1


def test_a_failing_compiler_counts_as_missing(monkeypatch, tmp_path):
    monkeypatch.setenv("SMALLM_CACHE", str(tmp_path))
    monkeypatch.setenv("CC", "false")
    assert kernels.load.__wrapped__() is None
    assert not list(tmp_path.iterdir())
    monkeypatch.setenv("CC", "no-such-compiler")
    assert kernels.load.__wrapped__() is None


@pytest.mark.parametrize("damage", [lambda content: content[: len(content) // 2], lambda content: b"garbage"])
def test_a_damaged_library_in_the_cache_is_built_again(monkeypatch, tmp_path, damage):
    monkeypatch.setenv("SMALLM_CACHE", str(tmp_path))
    assert kernels.load.__wrapped__() is not None
    (library,) = tmp_path.iterdir()
    content = library.read_bytes()
    library.unlink()  # a loaded library must not change
    library.write_bytes(damage(content))
    assert kernels.load.__wrapped__() is not None
    assert content in [path.read_bytes() for path in tmp_path.iterdir()]


def test_a_compiler_that_hangs_counts_as_missing(monkeypatch, tmp_path):
    (tmp_path / "cc").write_text("#!/bin/sh\nexec sleep 60\n")
    (tmp_path / "cc").chmod(0o755)
    monkeypatch.setenv("CC", str(tmp_path / "cc"))
    monkeypatch.setenv("SMALLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(compiler, "TIMEOUT", 0.1)
    assert kernels.load.__wrapped__() is None


@pytest.mark.skipif(sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs glibc")
def test_freed_memory_is_kept_for_the_next_step():
    """Otherwise the system clears the pages again in each step."""
    resource = pytest.importorskip("resource")

    def page_faults():
        begun = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(16_000_000)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - begun

    page_faults()
    assert min(page_faults() for _ in range(3)) < 1000  # of 15,600 pages


def test_kernels_refuse_tensors_that_they_would_misread():
    x, gain = numbers(4, 64, seed=1), numbers(64, seed=2)
    for other in (gain.double(), gain[:32], torch.stack([gain, gain], 1)[:, 0], gain.to("meta")):
        with pytest.raises(AssertionError):
            operations.rms_norm(x, other)
    for targets in (torch.zeros(1, 3, dtype=torch.long), torch.zeros(1, 4, dtype=torch.int32)):
        with pytest.raises(AssertionError):
            operations.cross_entropy(x[None], targets)


def test_a_block_refuses_other_parameters_than_its_own():
    model = TransformerLanguageModel(40, ModelConfig(n_head=2, n_embd=64, block_size=8), seed=1)
    block, x, tables = model.h[0], numbers(1, 8, 64, seed=3), model.rotary(8)
    block(x, *tables)
    block.bias = torch.nn.Parameter(torch.zeros(64))
    with pytest.raises(AssertionError):
        block(x, *tables)


def test_a_second_derivative_raises():
    """The kernels compute the first derivative only."""
    x = numbers(4, 64, seed=1).requires_grad_()
    block, tables, inputs = dropped_block(0.0)
    inputs.requires_grad_()
    targets = torch.zeros(1, 4, dtype=torch.long)
    for y, at in ((operations.rms_norm(x, torch.ones(64)), x), (operations.cross_entropy(x[None], targets), x),
                  (block(inputs, *tables), inputs)):  # fmt: skip
        (first,) = torch.autograd.grad(y.square().sum(), at, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            first.sum().backward()
