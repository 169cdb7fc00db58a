"""SFT and GRPO on a mixture of experts, from random weights."""

import dataclasses
import json

import pytest
import torch
from burnish.algorithms import grpo, sft
from burnish.model.adapter import adapters, linears
from burnish.model.checkpoint import load_model, save_model
from burnish.model.config import Experts
from burnish.model.errors import InputError
from burnish.model.text.tokenizer import Tokenizer
from burnish.model.transformer import Transformer


def metrics_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def sparse(model_folder, tmp_path):
    """model_folder with four experts in place of each feed-forward layer, two for each token."""
    config = dataclasses.replace(
        load_model(model_folder).config,
        model_type="mixtral",
        experts=Experts(4, 2, 24, (True, True), renormalize=True, balance_coefficient=0.01),
    )
    save_model(Transformer(config, seed=0), tmp_path / "sparse", Tokenizer.load(model_folder))
    return tmp_path / "sparse"


def sft_config(sparse, demonstrations, output, **changes):
    return sft.Config(
        model=sparse,
        data=demonstrations,
        output=output,
        **{"steps": 30, "batch_size": 16, "learning_rate": 1e-2, "device": "cpu"} | changes,
    )


def test_sft_and_grpo_train_experts(sparse, demonstrations, prompts, tmp_path):
    start = sft.train(sft_config(sparse, demonstrations, tmp_path / "sft", steps=60))
    lines = metrics_of(tmp_path / "sft")
    assert lines[-1]["loss"] < 0.6 * lines[0]["loss"]
    assert all(1.9 < line["balance"] < 4 and 1 <= line["busiest_expert"] <= 2 for line in lines)
    assert all(line["dropped"] == 0 for line in lines)

    before, after = load_model(sparse), load_model(start)
    moved = [
        bool((a != b).any())
        for a, b in zip(before.layers[0].mlp.parameters(), after.layers[0].mlp.parameters(), strict=True)
    ]
    assert all(moved)

    grpo.train(
        grpo.Config(
            model=start,
            data=prompts,
            reward=("burnish.algorithms.recipes.sums:form",),
            output=tmp_path / "grpo",
            steps=25,
            prompts_per_step=8,
            group_size=4,
            max_new_tokens=12,
            learning_rate=3e-3,
            device="cpu",
        )
    )

    lines = metrics_of(tmp_path / "grpo")
    first, last = (sum(line["reward"] for line in part) / 5 for part in (lines[:5], lines[-5:]))
    assert last > first + 0.1
    assert max(line["mismatch"] for line in lines if "mismatch" in line) < 1e-4
    assert all(line["dropped"] == 0 and line["balance"] >= 1.9 for line in lines if "balance" in line)


def test_the_balance_loss_evens_the_load(sparse, demonstrations, tmp_path):
    ends = []
    for coefficient in (0.0, 1.0):
        file = sparse / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"router_aux_loss_coef": coefficient}))
        output = tmp_path / f"out-{coefficient}"
        sft.train(sft_config(sparse, demonstrations, output))
        ends.append(metrics_of(output)[-1]["balance"])
    assert ends[1] < 2.02 and ends[1] < ends[0]


def test_an_adapter_on_a_mixture_of_experts(sparse, demonstrations, tmp_path):
    sft.train(sft_config(sparse, demonstrations, tmp_path / "lora", lora_rank=4))
    lines = metrics_of(tmp_path / "lora")
    assert lines[-1]["loss"] < 0.97 * lines[0]["loss"]


def test_the_experts_of_targets_alone_get_an_adapter(sparse, demonstrations, tmp_path):
    flags = {"lora_rank": 4, "lora_targets": ("down_proj",), "steps": 1}
    trained = sft.train(sft_config(sparse, demonstrations, tmp_path / "down", **flags))
    assert {name.rpartition(".mlp.")[2] for name in adapters(load_model(trained))} == {"experts.down_proj"}

    for flag in ("lora_dora", "lora_dropout"):
        flags = {"lora_rank": 4, flag: 0.5 if flag == "lora_dropout" else True}
        with pytest.raises(
            InputError, match=f"--{flag.replace('_', '-')}: expected --lora-targets beside it"
        ):
            sft.train(sft_config(sparse, demonstrations, tmp_path / "experts", **flags))
    dora = {"lora_rank": 4, "lora_dora": True, "lora_targets": ("q_proj",), "steps": 1}
    sft.train(sft_config(sparse, demonstrations, tmp_path / "dora", **dora))


def test_adapters_on_experts_in_4_bits(sparse, demonstrations, prompts, tmp_path):
    """sft, then grpo with the adapter that it left: experts' adapters move, the base stays in 4 bits."""
    flags = {"lora_rank": 4, "base_4bit": True, "steps": 20}
    start = sft.train(sft_config(sparse, demonstrations, tmp_path / "sft", **flags))
    lines = metrics_of(tmp_path / "sft")
    assert lines[-1]["loss"] < 0.97 * lines[0]["loss"]

    (tmp_path / "rewards.py").write_text(
        "def length(completions, **_):\n    return [len(c) for c in completions]\n"
    )

    output = grpo.train(
        grpo.Config(
            model=start,
            data=prompts,
            reward=(f"{tmp_path}/rewards.py:length",),
            output=tmp_path / "grpo",
            steps=2,
            prompts_per_step=4,
            group_size=4,
            max_new_tokens=8,
            learning_rate=3e-3,
            device="cpu",
        )
    )

    before, after = load_model(start), load_model(output)
    for model in (before, after):
        assert all(layer.four_bit is not None for name, layer in linears(model).items() if name != "lm_head")
    pairs = zip(adapters(before).items(), adapters(after).values(), strict=True)
    moved = {name: not torch.equal(was.b, now.b) for (name, was), now in pairs}
    assert len(moved) == 12 and all(moved.values())
