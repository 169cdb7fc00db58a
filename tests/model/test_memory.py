"""The memory calculator against a small model that is trained, and the table in docs/lora.md against the calculator."""

from dataclasses import replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from burnish.algorithms.run.optimizer import make_optimizer, state_bytes
from burnish.kernels import _chip
from burnish.model import ModelConfig, Rope, Transformer, pack
from burnish.model.adapter import add_lora, linears, quantize_base
from burnish.model.adapters.config import LoraConfig
from burnish.model.config import Experts
from burnish.model.memory import SHAPES, Training, activation_memory, simulated, table, training_memory
from burnish.model.placement import body_of
from burnish.model.scalar import ScalarModel
from faults import check_of, control, faults_of
from planted import plant
from torch.profiler import ProfilerActivity

SMALL = ModelConfig(300, 64, 96, 3, 4, 2, qkv_bias=True)
WIDE = ModelConfig(1024, 128, 352, 3, 4, 2)
EXPERTS = Experts(4, 2, 96, (True, True, True))
MODES = {"full": (None, False), "lora": (LoraConfig(4, 8), False), "qlora": (LoraConfig(4, 8), True)}


def nbytes(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def trained(config: ModelConfig, training: Training, kind: str = "adamw"):
    """A model that holds the states of its optimizer, as after a first step."""
    model = ScalarModel(config) if training.scalar else Transformer(config)
    body_of(model).checkpoint_activations = training.checkpoint_activations
    if training.lora is not None:
        if training.on_gpu:
            model.bfloat16()
        saved = {"modules_to_save": ("score",)} if training.scalar else {}
        add_lora(model, training.lora.rank, training.lora.alpha, **saved)
    if training.base_4bit:
        quantize_base(model)
    optimizer = make_optimizer(model, 1e-3, kind=kind)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def sizes_of(model, optimizer) -> dict[str, int]:
    adapter = [p for name, p in model.named_parameters() if ".lora." in name]
    weights = [p for name, p in model.named_parameters() if ".lora." not in name]
    quantized = [layer.four_bit for layer in linears(model).values() if layer.four_bit is not None]
    weights += [x for weight in quantized for x in vars(weight).values() if isinstance(x, torch.Tensor)]
    states = [x for state in optimizer.state.values() for name, x in state.items() if name != "step"]
    return {
        "weights": nbytes(weights),
        "adapter": nbytes(adapter),
        "gradients": nbytes(p for p in model.parameters() if p.requires_grad),
        "optimizer": nbytes(states),
    }


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_what_is_counted_is_what_training_holds(mode, tied):
    config = replace(SMALL, tie_word_embeddings=tied)
    lora, base_4bit = MODES[mode]
    training = Training(lora, base_4bit, tokens=0)
    model, optimizer = trained(config, training)
    memory = training_memory(config, training)
    assert {name: getattr(memory, name) for name in sizes_of(model, optimizer)} == sizes_of(model, optimizer)
    assert memory.activations == memory.working == 0


@pytest.mark.parametrize("kind", ["adamw", "muon", "adamw8bit"])
@pytest.mark.parametrize("experts", [None, EXPERTS])
def test_each_optimizers_states_are_counted(kind, experts):
    config = replace(WIDE, experts=experts)
    training = Training(tokens=0, optimizer_bytes=partial(state_bytes, kind))
    _, optimizer = found = trained(config, training, kind)
    assert training_memory(config, training).optimizer == sizes_of(*found)["optimizer"] > 0
    assert {group["rule"] for group in optimizer.param_groups} == {"adamw", kind}


def peak(work) -> int:
    """The most bytes of tensors that were alive at a time while `work` ran, beyond those before it."""
    with torch.profiler.profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    results: Any = profiler.profiler
    events = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(accumulate(changes))


CASES = {
    "full": {},
    "full, layers recomputed": {"checkpoint_activations": True},
    "LoRA": {"lora": LoraConfig(8, 16)},
    "QLoRA, layers recomputed": {
        "lora": LoraConfig(8, 16),
        "base_4bit": True,
        "checkpoint_activations": True,
    },
    "reward model": {"scalar": True},
    "experts": {"experts": EXPERTS},
    "muon": {"kind": "muon"},
    "adamw8bit": {"kind": "adamw8bit"},
}


OFTEN = ("full", "QLoRA, layers recomputed")


@pytest.mark.parametrize(
    "case", [case if case in OFTEN else pytest.param(case, marks=pytest.mark.slow) for case in CASES]
)
def test_a_step_takes_what_is_counted(case):
    """A step of two micro-batches with the optimizer's part: tensors held, and the peak beyond them, within 15 %."""
    flags = {"checkpoint_activations": False} | CASES[case]
    kind, config = flags.pop("kind", "adamw"), replace(WIDE, experts=flags.pop("experts", None))
    training = Training(**flags, tokens=1024, on_gpu=False, optimizer_bytes=partial(state_bytes, kind))
    model, optimizer = trained(config, training, kind)
    packed = pack([[*range(512)]] * 2)
    rows = torch.arange(1024)[packed.predictors >= 0]

    def step() -> None:
        for _ in range(2):
            found = model.values(packed, rows) if training.scalar else model.score(packed, rows)[0]
            found.sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    sizes = sizes_of(model, optimizer)
    measured = sizes["weights"] + sizes["adapter"] + sizes["optimizer"] + peak(step)
    counted = training_memory(config, training)
    assert counted.total == pytest.approx(measured, rel=0.15)
    beyond = counted.gradients + counted.activations + counted.working
    assert beyond == pytest.approx(measured - counted.kept, rel=0.25), "activations alone"


@control
def layers_of_one_kind_take_the_same() -> None:
    """Counted from one layer of each kind and one more, or from all. With two kinds their order moves the peak."""
    config = replace(SMALL, num_hidden_layers=4, rope_layers=(), windows=())
    mixed = replace(config, experts=replace(EXPERTS, layers=(False, False, True, True)))
    plans = (Training(tokens=80), Training(checkpoint_activations=False, tokens=80))
    for shape, training in ((config, plans[0]), (mixed, plans[1])):
        kept, most = activation_memory(shape, training)
        whole = simulated(shape, training)
        assert kept == whole.kept
        rel = 0.05 if shape is mixed else 0
        assert most == pytest.approx(max(whole.forward, whole.backward), rel=rel, abs=0)


def test_layers_of_one_kind_take_the_same():
    layers_of_one_kind_take_the_same()


@pytest.mark.parametrize("fault", faults_of(__file__), ids=lambda fault: fault.id)
def test_a_planted_fault_is_caught(fault, monkeypatch):
    plant(fault, monkeypatch)
    with pytest.raises(AssertionError):
        check_of(fault)()


def test_65b_in_4_bits_trains_on_a_card_of_48_gb():
    assert training_memory(SHAPES["LLaMA 65B"], Training(LoraConfig(16, 32), True)).total < 48e9
    parameters = sum(p.numel() for p in Transformer(SHAPES["LLaMA 65B"], device="meta").parameters())
    assert parameters == pytest.approx(65.2e9, rel=0.01)


def test_counting_leaves_no_trace():
    """Tables that ops keep hold numbers afterwards, and ops on a CPU still take the way of a CPU."""
    training_memory(replace(SMALL, rope=Rope(rope_theta=777.0)), Training(LoraConfig(4, 8), True, tokens=20))
    assert _chip.TARGET is None
    model, _ = trained(
        replace(SMALL, rope=Rope(rope_theta=777.0)), Training(LoraConfig(4, 8), True, on_gpu=False)
    )
    logprob, _, _ = model.score(pack([[1, 2, 3]]), torch.tensor([1, 2]))
    assert logprob.isfinite().all() and type(logprob) is torch.Tensor


@pytest.mark.slow
def test_the_table_in_the_docs_is_the_calculators():
    docs = Path(__file__).parents[2] / "docs" / "lora.md"
    assert table() in docs.read_text(), (
        "run `python -m burnish.model.memory` and put its table into docs/lora.md"
    )


@pytest.mark.parametrize("mode", MODES)
def test_processes_share_what_is_kept_but_for_four_bits(mode):
    lora, base_4bit = MODES[mode]
    tokens = 64 if mode == "full" else 0
    plans = [Training(lora, base_4bit, tokens, processes=count) for count in (1, 4)]
    one, four = (training_memory(SMALL, plan) for plan in plans)
    for part in ("adapter", "gradients", "optimizer"):
        assert getattr(four, part) == getattr(one, part) // 4
    model = Transformer(SMALL)
    packed = 0
    if base_4bit:
        quantize_base(model)
        packed = sum(layer.four_bit.nbytes for layer in linears(model).values() if layer.four_bit)
    assert four.weights == (one.weights - packed) // 4 + packed
    assert (four.activations, four.working) == (one.activations, one.working) and one.gathered == 0


def test_what_is_whole_while_it_is_used():
    model = Transformer(SMALL)
    outside = nbytes(p for name, p in model.named_parameters() if not name.startswith("layers."))
    layer = nbytes(model.layers[0].parameters())
    assert (
        training_memory(SMALL, Training(tokens=0, processes=4)).gathered == 2 * outside + 3 * layer
    )  # weights and gradients
