"""--optimizer: each against its definition and against others' code, what each trains, and what a checkpoint holds."""

import dataclasses
import sys
from dataclasses import replace

import pytest
import torch
from burnish.algorithms import ppo, sft
from burnish.algorithms.run.adamw8bit import AdamW8bit, load_bitsandbytes
from burnish.algorithms.run.checkpoint import read_checkpoint, write_checkpoint
from burnish.algorithms.run.checks import check_flags
from burnish.algorithms.run.muon import ITERATIONS, A, B, C, Muon, orthogonal
from burnish.algorithms.run.optimizer import make_optimizer, states_of
from burnish.model.adapter import add_lora, quantize_base
from burnish.model.config import Experts
from burnish.model.errors import InputError
from burnish.model.packed import pack
from burnish.model.scalar import ScalarModel
from burnish.model.transformer import Transformer
from controlled import metrics_of
from faults import check_of, control, faults_of
from planted import plant
from safetensors.torch import load_file
from tiny import TINY
from torch import nn

KINDS = ("adamw", "muon", "adamw8bit")
EXPERTS = Experts(3, 2, 24, (True, True), shared_size=8, shared_gate=True)
CLAMPED = Experts(3, 2, 24, (True, True), clamped=True)  # its experts have biases (E, N)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def stepped(
    optimizer: torch.optim.Optimizer, weight: nn.Parameter, gradients: list[torch.Tensor]
) -> torch.Tensor:
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()
    return weight.detach()


# ---- Muon


@pytest.mark.parametrize("shape", [(24, 64), (96, 40), (16, 16), (1, 8), (8, 1)])
def test_muon_is_torchs_to_the_bit(shape):
    ours, theirs = nn.Parameter(drawn(*shape)), nn.Parameter(drawn(*shape))
    flags = {"lr": 0.02, "weight_decay": 0.1}
    gradients = [drawn(*shape, seed=seed) for seed in range(1, 4)]
    one = stepped(Muon([ours], **flags, dtype=torch.bfloat16), ours, gradients)
    other = torch.optim.Muon([theirs], **flags, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    assert torch.equal(one, stepped(other, theirs, gradients))


@control
def experts_are_separate_matrices() -> None:
    """Each expert as a matrix of its own, with gradients of very different sizes."""
    sizes = torch.tensor([1.0, 1e-4, 1e3])[:, None, None]
    gradients = [sizes * drawn(3, 24, 40, seed=seed) for seed in (1, 2)]
    stack = nn.Parameter(drawn(3, 24, 40))
    found = stepped(Muon([stack], 0.02, weight_decay=0.1, dtype=torch.bfloat16), stack, gradients)
    for expert in range(3):
        alone = nn.Parameter(drawn(3, 24, 40)[expert].clone())
        theirs = torch.optim.Muon([alone], lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
        expected = stepped(theirs, alone, [gradient[expert] for gradient in gradients])
        assert torch.equal(found[expert], expected), f"expert {expert}"


def test_experts_are_separate_matrices():
    experts_are_separate_matrices()


def newton_schulz(matrix: torch.Tensor) -> torch.Tensor:
    x = matrix.double() / matrix.double().norm()
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = A * x + (B * gram + C * gram @ gram) @ x
    return x


@pytest.mark.parametrize("shape", [(24, 64), (96, 40), (48, 48)])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-5), (torch.bfloat16, 0.04)])
def test_orthogonal_is_newton_schulz_in_fp64(shape, dtype, bound):
    """The distance from the exact iterations, as a share of their result."""
    matrix = drawn(*shape)
    found, expected = orthogonal(matrix.to(dtype)).double(), newton_schulz(matrix)
    assert (found - expected).norm() < bound * expected.norm()
    values = torch.linalg.svdvals(found)
    assert values.min() > 0.6 and values.max() < 1.3
    u, _, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    assert (found * (u @ v)).sum() > 0.95 * found.norm() * (u @ v).norm()


def test_an_update_has_the_size_of_adamws():
    """The root mean square of a step is 0.2 of the learning rate, whatever the shape."""
    for shape in ((16, 256), (128, 128), (300, 20)):
        weight = nn.Parameter(torch.zeros(shape))
        step = stepped(Muon([weight], lr=1.0), weight, [drawn(*shape)])
        assert 0.15 < step.square().mean().sqrt() < 0.25, shape


# ---- which parameters


def names_by_rule(model: nn.Module, kind: str) -> dict[str, set[str]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found: dict[str, set[str]] = {}
    for group in make_optimizer(model, 1e-3, 0.1, kind=kind).param_groups:
        found.setdefault(group["rule"], set()).update(names[id(p)] for p in group["params"])
    assert sum(map(len, found.values())) == sum(p.requires_grad for p in model.parameters())
    return found


@control
def muon_trains_the_matrices_of_layers() -> None:
    found = names_by_rule(ScalarModel(replace(TINY, qkv_bias=True)), "muon")
    assert "score.weight" in found["adamw"] and "body.layers.1.mlp.up_proj.weight" in found["muon"]
    found = names_by_rule(Transformer(replace(TINY, experts=EXPERTS, model_type="qwen2_moe")), "muon")
    layer = {name.removeprefix("layers.0.") for name in found["muon"] if name.startswith("layers.0.")}
    shared = {f"mlp.shared_expert.{name}_proj.weight" for name in ("gate", "up", "down")}
    attention = {f"self_attn.{name}_proj.weight" for name in "qkvo"}
    assert layer == attention | shared | {f"mlp.experts.{name}_proj.weight" for name in ("gate_up", "down")}
    assert len(found["muon"]) == 2 * len(layer)
    assert {"embed_tokens.weight", "lm_head.weight", "layers.0.mlp.gate.weight"} <= found["adamw"]


def test_muon_trains_the_matrices_of_layers():
    muon_trains_the_matrices_of_layers()


@pytest.mark.parametrize("four_bit", [False, True])
def test_muon_trains_an_adapters_a_and_b(four_bit):
    model = Transformer(TINY)
    add_lora(model, 3, dora=True, modules_to_save=("lm_head",))
    if four_bit:
        quantize_base(model)
    found = names_by_rule(model, "muon")
    assert {name.rpartition(".")[2] for name in found["muon"]} == {"a", "b"} and len(found["muon"]) == 28
    assert {name.rpartition(".")[2] for name in found["adamw"]} == {"magnitude", "weight"}


@pytest.mark.slow
def test_8_bits_are_for_large_matrices_but_not_the_embedding():
    model = Transformer(replace(TINY, hidden_size=64, intermediate_size=96, vocab_size=100))
    small = {name for name, p in model.named_parameters() if p.numel() < 4096}
    found = names_by_rule(model, "adamw8bit")
    assert found["adamw"] == small | {"embed_tokens.weight"}
    assert {"lm_head.weight", "layers.0.mlp.up_proj.weight"} <= found["adamw8bit"]


@control
def matrices_alone_are_decayed() -> None:
    """Gradients of zero: what moves is the decay."""
    for kind in KINDS:
        model = Transformer(replace(TINY, hidden_size=64, head_dim=32, qkv_bias=True, experts=CLAMPED))
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        for parameter in model.parameters():
            parameter.data += 1.0
            parameter.grad = torch.zeros_like(parameter)
        make_optimizer(model, 1e-2, 0.5, kind=kind).step()
        for name, parameter in model.named_parameters():
            is_vector = "norm" in name or name.endswith(("bias", "sinks"))
            decay = 0.0 if is_vector else 1e-2 * 0.5
            expected = (before[name] + 1.0) * (1 - decay)
            assert torch.allclose(parameter.detach(), expected, atol=1e-6), f"{kind}: {name}"


def test_matrices_alone_are_decayed():
    matrices_alone_are_decayed()


# ---- AdamW in 8 bits


def test_8_bit_blocks_that_fill_rows_are_those_of_bitsandbytes():
    from bitsandbytes.optim import AdamW8bit as Theirs

    gradients = [drawn(20, 512, seed=seed) for seed in range(1, 5)]
    ours, theirs = nn.Parameter(drawn(20, 512)), nn.Parameter(drawn(20, 512))
    flags = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    one = stepped(AdamW8bit([ours], **flags), ours, gradients)
    assert torch.equal(one, stepped(Theirs([theirs], **flags), theirs, gradients))


@control
def rows_do_not_depend_on_other_rows() -> None:
    """A matrix of a width that fills no block, whole and by rows, as processes share it."""
    gradients = [drawn(16, 300, seed=seed) for seed in range(1, 5)]
    weight = nn.Parameter(drawn(16, 300))
    optimizer = AdamW8bit([weight], lr=1e-2)
    found = stepped(optimizer, weight, gradients)
    for rows in (slice(0, 5), slice(5, 16)):
        part = nn.Parameter(drawn(16, 300)[rows].clone())
        expected = stepped(AdamW8bit([part], lr=1e-2), part, [gradient[rows] for gradient in gradients])
        assert torch.equal(found[rows], expected)
    state = optimizer.state[weight]
    moments = ("exp_avg_codes", "exp_avg_absmax", "exp_avg_sq_codes", "exp_avg_sq_absmax")
    assert [[*state[name].shape] for name in moments] == [[16, 300], [16, 2]] * 2
    assert state["exp_avg_codes"].unique().numel() > 50 < state["exp_avg_sq_codes"].unique().numel()


def test_rows_do_not_depend_on_other_rows():
    rows_do_not_depend_on_other_rows()


def losses_of(kind: str, seed: int, steps: int, rate: float) -> tuple[list[float], torch.optim.Optimizer]:
    """A regression of two layers on a teacher of the same form."""
    torch.manual_seed(seed)
    config = replace(TINY, hidden_size=64, intermediate_size=96, head_dim=32)
    model, x = Transformer(config, seed=seed), torch.randn(64, 64)
    teacher = Transformer(config, seed=seed + 100)
    mlp, target = model.layers[0].mlp, teacher.layers[0].mlp
    with torch.no_grad():
        for layer in (*mlp.children(), *target.children()):
            if isinstance(layer, nn.Linear):
                layer.weight *= 8
        y = target(x, _Pass())

    optimizer, losses = make_optimizer(model, rate, kind=kind), []
    for _ in range(steps):
        loss = (mlp(x, _Pass()) - y).square().mean() / y.square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, optimizer


class _Pass:
    adapter = None


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_a_regression_is_learned(kind, seed):
    losses, _ = losses_of(kind, seed, 100, 1e-2)
    assert losses[0] > 1 and losses[-1] < 0.05, losses[::30]


def test_8_bits_stay_near_32():
    """Over 20 steps the loss differs by less than 2 %, and the moments take about a quarter of the bytes."""
    (exact, adamw), (found, eight) = (losses_of(kind, 0, 20, 3e-3) for kind in ("adamw", "adamw8bit"))
    assert found[0] == exact[0] and found[-1] < 0.9 * found[0] and found != exact
    for one, other in zip(found, exact, strict=True):
        assert one == pytest.approx(other, rel=0.02)

    bytes_of = lambda state: sum(tensor.nbytes for name, tensor in state.items() if name != "step")
    (weight,) = [p for p in eight.state if p.shape == (64, 96)]
    (same,) = [p for p in adamw.state if p.shape == (64, 96)]
    assert bytes_of(eight.state[weight]) / bytes_of(adamw.state[same]) == pytest.approx(0.25, abs=0.02)


def test_without_the_package_there_is_a_sentence(monkeypatch, model_folder, demonstrations, tmp_path):
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(InputError, match=r"--optimizer adamw8bit: .* pip install 'burnish\[adamw8bit\]'"):
        load_bitsandbytes()
    cfg = sft.Config(
        model=model_folder,
        data=demonstrations,
        output=tmp_path / "run",
        optimizer="adamw8bit",
        device="cpu",
    )
    with pytest.raises(InputError, match="--optimizer adamw8bit"):
        check_flags(cfg)
    assert not cfg.output.exists()


# ---- checkpoints


def trained(kind: str, seed: int = 0, steps: int = 2) -> tuple[Transformer, torch.optim.Optimizer]:
    config = replace(TINY, hidden_size=64, head_dim=32, experts=CLAMPED, initializer_range=0.1)
    model = Transformer(config, seed=seed)
    optimizer = make_optimizer(model, 1e-2, 0.1, kind=kind)
    train(model, optimizer, steps)
    return model, optimizer


def train(model: Transformer, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for step in range(steps):
        packed = pack([[step + 1, 2, 3, 4, step + 5, 6]])
        (-model.score(packed, torch.arange(1, 6))[0].sum()).backward()
        optimizer.step()
        optimizer.zero_grad()


@control
def what_is_read_goes_on_as_what_was_written(kind: str, folder) -> None:
    model, optimizer = trained(kind)
    file = folder / f"{kind}.safetensors"
    write_checkpoint(file, {"model": model, "optimizer": optimizer}, {"step": 2})
    other, fresh = trained(kind, seed=1, steps=0)
    read_checkpoint(file, {"model": other, "optimizer": fresh})
    for one, two in ((model, optimizer), (other, fresh)):
        train(one, two, 2)
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_read_goes_on_as_what_was_written(kind, tmp_path):
    what_is_read_goes_on_as_what_was_written(kind, tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_the_states_of_a_checkpoint_are_those_that_an_optimizer_has(kind):
    _, optimizer = trained(kind)
    rules = {group["rule"] for group in optimizer.param_groups if group["params"]}
    assert kind in rules
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            expected = states_of(group["rule"], parameter)
            found = {name: ([*x.shape], x.dtype) for name, x in optimizer.state[parameter].items()}
            assert found == {name: (state.shape, state.dtype) for name, state in expected.items()}
            assert all((x >= expected[name].at_least).all() for name, x in optimizer.state[parameter].items())


@pytest.mark.parametrize("written", KINDS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_of_another_optimizer_is_refused(written, kind, tmp_path):
    model, optimizer = trained(written)
    write_checkpoint(tmp_path / "file", {"model": model, "optimizer": optimizer}, {"step": 2})
    other, fresh = trained(kind, seed=1, steps=0)
    if written == kind:
        read_checkpoint(tmp_path / "file", {"model": other, "optimizer": fresh})
        return
    before = [parameter.clone() for parameter in other.parameters()]
    with pytest.raises(
        InputError, match=f"written with --optimizer {written}, not {kind}: give --optimizer {written}"
    ):
        read_checkpoint(tmp_path / "file", {"model": other, "optimizer": fresh})
    assert not fresh.state and all(map(torch.equal, before, other.parameters()))


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        ("muon", "momentum_buffer", float("nan")),
        ("adamw8bit", "exp_avg_sq_absmax", -1.0),
        ("adamw8bit", "step", 0.0),
    ],
)
def test_numbers_that_no_optimizer_writes_are_refused(kind, name, value, tmp_path):
    model, optimizer = trained(kind)
    state = next(state for state in optimizer.state.values() if name in state)
    state[name].view(-1)[0] = value
    write_checkpoint(tmp_path / "file", {"model": model, "optimizer": optimizer}, {"step": 2})
    other, fresh = trained(kind, seed=1, steps=0)
    with pytest.raises(InputError, match=f"{name}: expected"):
        read_checkpoint(tmp_path / "file", {"model": other, "optimizer": fresh})


# ---- runs


@pytest.mark.parametrize("kind", ["muon", "adamw8bit"])
def test_a_resumed_run_is_one_that_was_not_stopped(
    kind, model_folder, demonstrations, prompts, tmp_path, monkeypatch
):
    """SFT with an adapter, and PPO, whose critic has the optimizer, too."""
    monkeypatch.setattr("burnish.algorithms.run.optimizer.LEAST", 48)  # 8 bits also for a tiny model
    (tmp_path / "odd.py").write_text(
        "def odd(completion_ids, **_):\n    return [len(x) % 3 for x in completion_ids]\n"
    )
    common = {
        "schedule": "constant",
        "model": model_folder,
        "save_every": 2,
        "learning_rate": 1e-2,
        "device": "cpu",
        "optimizer": kind,
    }

    rl = {"reward": (f"{tmp_path}/odd.py:odd",), "prompts_per_step": 6, "max_new_tokens": 6, "minibatches": 1}
    rl |= {"epochs_per_rollout": 1, "critic_learning_rate": 1e-2}
    configs = [
        sft.Config(data=demonstrations, batch_size=8, output=tmp_path, lora_rank=3, base_4bit=True, **common),
        ppo.Config(data=prompts, output=tmp_path, **rl, **common),
    ]

    for module, cfg in zip((sft, ppo), configs, strict=True):
        folders = [tmp_path / module.__name__ / name for name in ("whole", "cut")]
        whole = module.train(dataclasses.replace(cfg, steps=3, output=folders[0]))
        module.train(dataclasses.replace(cfg, steps=2, output=folders[1]))
        again = module.train(dataclasses.replace(cfg, steps=3, output=folders[1], resume=True))
        one, other = (load_file(next(folder.glob("*model.safetensors"))) for folder in (whole, again))
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
        norms = [[line["grad_norm"] for line in metrics_of(folder)] for folder in folders]
        assert norms[0] == norms[1] and len(norms[0]) == 3


# ---- planted faults


@pytest.mark.parametrize("fault", faults_of(__file__), ids=lambda fault: fault.id)
def test_a_planted_fault_is_caught(fault, tmp_path, monkeypatch):
    plant(fault, monkeypatch)
    with pytest.raises((AssertionError, InputError)):
        check_of(fault)(*((fault.on, tmp_path) if fault.on else ()))
