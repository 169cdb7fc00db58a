"""The balance loss beside transformers' and TRL's, live: its value, and the gradients of one step of each trainer.

A prompt that two answers share is one sequence here and two rows in TRL, which counts its tokens twice: where it is
shared, TRL's mask leaves the second out, and nothing else differs.
"""

import json

import pytest
import torch
from burnish.algorithms import dpo, grpo, kto, reward, sft
from burnish.algorithms.data import groups as rollout
from burnish.algorithms.objectives.advantages import group_advantages
from burnish.algorithms.run import learner
from burnish.model.checkpoint import load_model
from burnish.model.errors import InputError
from burnish.model.generate import Sample
from burnish.model.packed import pack

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
trl = pytest.importorskip("trl", reason="trl is not installed")
datasets = pytest.importorskip("datasets", reason="datasets is not installed")
from transformers.models.mixtral import modeling_mixtral  # noqa: E402 (skipped above where it is missing)

OWN = {
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {"num_experts": 4, "mlp_only_layers": [0], "shared_expert_intermediate_size": 16},
    "qwen3_moe": {"num_experts": 4, "head_dim": 8, "norm_topk_prob": True},
    "olmoe": {"num_experts": 4},
    "gpt_oss": {"num_local_experts": 4, "head_dim": 8, "sliding_window": 32},
}
COEFFICIENT = 0.3  # large, so that it is seen in every gradient
PROMPT = 3  # tokens


def tokenizer_of():
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<pad>": 0, "<eos>": 1} | {f"w{i}": i for i in range(2, 60)}
    plain = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<eos>", pad_token="<pad>")


@pytest.fixture
def make(tmp_path):
    """make("mixtral", layers=6) is a folder of a model whose load is uneven."""

    def make(name, layers=2, kind="CausalLM", **more):
        sizes = {"vocab_size": 60, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": layers}
        sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "num_experts_per_tok": 2}
        sizes |= {} if name in ("mixtral", "gpt_oss", "olmoe") else {"moe_intermediate_size": 24}
        ids = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}

        config = transformers.AutoConfig.for_model(name, **sizes, **OWN[name], **ids, **more)
        torch.manual_seed(0)
        model = getattr(transformers, f"AutoModelFor{kind}").from_config(config)
        with torch.no_grad():
            for key, weight in model.named_parameters():
                if key.endswith(("gate.weight", "router.weight")):
                    weight.normal_(std=0.8)
                elif weight.dim() > 1:
                    weight.normal_(std=0.2)
        model.save_pretrained(tmp_path / name)
        tokenizer_of().save_pretrained(tmp_path / name)
        return tmp_path / name

    return make


def theirs_named(name):
    """transformers' name of one of our parameters, in memory."""
    name = name.removeprefix("body.")
    name = name if name.startswith(("lm_head", "score")) else f"model.{name}"
    return name.removesuffix(".weight") if ".experts." in name else name


def same_gradients(ours, theirs, least=1e-3):
    """Compare gradients by our names, and check that some are not 0."""
    assert max(grad.abs().max() for grad in ours.values()) > least
    for name, grad in ours.items():
        expected = theirs[theirs_named(name)]
        scale = max(expected.abs().max().item(), 1e-2)
        torch.testing.assert_close(
            grad, expected, rtol=1e-4, atol=2e-5 * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("layers", [2, 6])
@pytest.mark.parametrize("name", OWN)
def test_transformers_value_and_gradient(make, name, layers):
    """Padding is not counted, prompts are, and layers without experts are none."""
    folder = make(name, layers + (name == "qwen2_moe"))  # whose first layer is dense
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ours = load_model(folder)
    ids = torch.randint(2, 60, (3, 9), generator=torch.Generator().manual_seed(1))
    lengths = [9, 4, 6]
    mask = (torch.arange(9) < torch.tensor(lengths)[:, None]).long()

    expected = theirs(ids, attention_mask=mask, output_router_logits=True, use_cache=False).aux_loss
    ours(pack([row[:n].tolist() for row, n in zip(ids, lengths, strict=True)]))
    value = ours.balance_loss(1.0)
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    assert abs(ours.balance_loss(1.0, pooled=False).item() - expected.item()) > 1e-3

    unmasked = theirs(ids, output_router_logits=True, use_cache=False).aux_loss
    assert abs(unmasked.item() - expected.item()) > 1e-4
    value.backward()
    expected.backward()

    if name == "gpt_oss":  # its experts lie otherwise in memory
        pairs = [
            (layer.mlp.gate.weight.grad, other.mlp.router.weight.grad)
            for layer, other in layers_of(ours, theirs)
        ]
        for grad, other in pairs:
            torch.testing.assert_close(grad, other, rtol=1e-4, atol=1e-6)
        return
    own = {key: p.grad for key, p in ours.named_parameters() if p.grad is not None and "shared" not in key}
    same_gradients(own, {key: p.grad for key, p in theirs.named_parameters()})


def layers_of(ours, theirs):
    return zip(ours.layers, theirs.model.layers, strict=True)


def test_deepseek_has_none_in_transformers():
    from transformers.models.deepseek_v3 import configuration_deepseek_v3, modeling_deepseek_v3

    assert not hasattr(modeling_deepseek_v3, "load_balancing_loss_func")
    assert not hasattr(configuration_deepseek_v3.DeepseekV3Config(), "router_aux_loss_coef")


# ---- TRL's trainers


class Gradients(transformers.TrainerCallback):
    def __init__(self):
        self.found = {}

    def on_pre_optimizer_step(self, args, state, control, model, **_):
        self.found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def trl_step(kind, folder, rows, coefficient, **more):
    """The gradients of one optimizer step of TRL on all rows, and what it logs."""
    gradients = Gradients()
    settings = {
        "max_steps": 1,
        "per_device_train_batch_size": len(rows),
        "learning_rate": 0.0,
        "max_grad_norm": 0.0,
    }
    settings |= {
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
    }
    settings |= {"disable_tqdm": True, "dataloader_pin_memory": False, "gradient_checkpointing": False}

    if coefficient is not None:
        settings["router_aux_loss_coef"] = coefficient
    auto = "SequenceClassification" if kind == "Reward" else "CausalLM"
    model = getattr(transformers, f"AutoModelFor{auto}").from_pretrained(folder, dtype=torch.float32)

    trainer = getattr(trl, f"{kind}Trainer")(
        model=model,
        args=getattr(trl, f"{kind}Config")(output_dir=str(folder / "out"), **settings | more),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer_of(),
        callbacks=[gradients],
    )
    trainer.train()
    (logged,) = [line for line in trainer.state.log_history if "loss" in line]
    return gradients.found, logged


def our_step(module, folder, rows, monkeypatch, **more):
    """The same of ours."""
    found = {}
    step = learner.optimizer_step

    def keep(model, *rest):
        found.update({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        return step(model, *rest)

    data, output = folder / "rows.jsonl", folder / f"ours-{len(list(folder.iterdir()))}"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {"steps": 1, "learning_rate": 0.0, "warmup_steps": 0, "device": "cpu"}
    if module is not grpo:
        common |= {"batch_size": len(rows)}
    with monkeypatch.context() as patch:
        patch.setattr(learner, "optimizer_step", keep)
        module.train(module.Config(model=folder, data=data, output=output, **common | more))
    return found, json.loads((output / "metrics.jsonl").read_text())


def texts(count, length):
    """Answers of `length(i)` words to prompts of PROMPT ones, no two of them alike."""
    draw = torch.Generator().manual_seed(2)
    words = lambda n: " ".join(f"w{int(i)}" for i in torch.randint(2, 60, (n,), generator=draw))
    return [(words(PROMPT), *(" " + words(length(2 * i + j)) for j in range(2))) for i in range(count)]


UNEVEN = texts(4, lambda i: 2 + i % 5)
EVEN = texts(4, lambda i: 4)
BOTH = pytest.mark.parametrize("name, layers", [("mixtral", 2), ("qwen3_moe", 6)])


@BOTH
def test_sft(make, monkeypatch, name, layers):
    folder = make(name, layers)
    rows = [{"prompt": prompt, "completion": answer} for prompt, answer, _ in UNEVEN]
    theirs, logged = trl_step("SFT", folder, rows, COEFFICIENT, loss_type="nll")
    ours, line = our_step(sft, folder, rows, monkeypatch, router_aux_loss_coef=COEFFICIENT)
    same_gradients(ours, theirs)
    assert line["balance"] == pytest.approx(logged["aux_loss"], rel=1e-4)
    assert line["loss"] + COEFFICIENT * line["balance"] == pytest.approx(logged["loss"], rel=1e-4)


def test_sft_in_micro_batches(make, monkeypatch):
    """Each has a balance of its own; of like size they weigh alike, which is TRL's weight for all."""
    folder = make("mixtral", 2, router_aux_loss_coef=COEFFICIENT)
    rows = [{"prompt": prompt, "completion": answer} for prompt, answer, _ in EVEN]
    accumulated = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    theirs, logged = trl_step("SFT", folder, rows, None, **accumulated)
    ours, line = our_step(sft, folder, rows, monkeypatch, micro_batch_tokens=1)
    same_gradients(ours, theirs)
    assert line["balance"] == pytest.approx(logged["aux_loss"], rel=1e-4)


@pytest.fixture
def prompt_once(monkeypatch):
    """TRL's second rows of a pair, the latter half, without their prompts."""
    original = modeling_mixtral.load_balancing_loss_func

    def once(gates, experts, top_k, mask):
        mask = mask.clone()
        mask[len(mask) // 2 :, :PROMPT] = 0
        return original(gates, experts, top_k, mask)

    monkeypatch.setattr(modeling_mixtral, "load_balancing_loss_func", once)


@BOTH
def test_dpo(make, monkeypatch, prompt_once, name, layers):
    """The reference's forward passes add none."""
    folder = make(name, layers)
    rows = [{"prompt": p, "chosen": chosen, "rejected": rejected} for p, chosen, rejected in UNEVEN]
    theirs, logged = trl_step("DPO", folder, rows, COEFFICIENT)
    ours, line = our_step(dpo, folder, rows, monkeypatch, router_aux_loss_coef=COEFFICIENT)
    same_gradients(ours, theirs)
    assert line["balance"] == pytest.approx(logged["aux_loss"], rel=1e-4)


@BOTH
def test_kto(make, monkeypatch, name, layers):
    folder = make(name, layers)
    rows = [{"prompt": p, "completion": a, "label": i % 2 == 0} for i, (p, a, _) in enumerate(UNEVEN)]
    theirs, logged = trl_step("KTO", folder, rows, COEFFICIENT)
    ours, line = our_step(kto, folder, rows, monkeypatch, router_aux_loss_coef=COEFFICIENT)
    same_gradients(ours, theirs)
    assert line["balance"] == pytest.approx(logged["aux_loss"], rel=1e-4)


@BOTH
def test_reward(make, monkeypatch, name, layers):
    """TRL's adds none; ours adds what a pass over its rows says, the prompt once."""
    folder = make(name, layers, "SequenceClassification", num_labels=1)
    rows = [{"prompt": p, "chosen": chosen, "rejected": rejected} for p, chosen, rejected in UNEVEN]
    joined = [
        {"chosen": row["prompt"] + row["chosen"], "rejected": row["prompt"] + row["rejected"]} for row in rows
    ]
    theirs, _ = trl_step("Reward", folder, joined, None, disable_dropout=True)

    without, _ = our_step(reward, folder, rows, monkeypatch, router_aux_loss_coef=0.0)
    same_gradients(without, theirs)
    ours, line = our_step(reward, folder, rows, monkeypatch, router_aux_loss_coef=COEFFICIENT)

    tokenizer = tokenizer_of()
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    sides = [
        [tokenizer(row[side] + "<eos>")["input_ids"] for row in joined] for side in ("chosen", "rejected")
    ]

    batch = tokenizer.pad({"input_ids": sides[0] + sides[1]}, return_tensors="pt", padding_side="right")
    mask = batch["attention_mask"]
    gates = model.model(batch["input_ids"], attention_mask=mask, output_router_logits=True, use_cache=False)
    counted = mask.clone()
    counted[len(rows) :, :PROMPT] = 0
    balance = modeling_mixtral.load_balancing_loss_func(gates.router_logits, 4, 2, counted)
    (COEFFICIENT * balance).backward()
    assert line["balance"] == pytest.approx(balance.item(), rel=1e-4)

    reached = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    added = {name: grad - without[name] for name, grad in ours.items()}
    same_gradients({name: grad for name, grad in added.items() if theirs_named(name) in reached}, reached)
    assert not any(grad.any() for name, grad in added.items() if theirs_named(name) not in reached)


@BOTH
def test_grpo(make, monkeypatch, name, layers):
    """The same samples on either side, each a micro-batch of its own, so that each has its prompt."""
    folder = make(name, layers)
    draw = torch.Generator().manual_seed(4)
    sampled = [torch.randint(2, 60, (5,), generator=draw).tolist() for _ in range(4)]
    scores = [0.0, 1.0, 1.0, 0.5]
    (folder / "score.py").write_text(f"def score(completions, **_):\n    return {scores}\n")
    rows = [{"prompt": prompt} for prompt, *_ in EVEN[:2]]

    def given(model, prompts, params, **options):
        return [Sample(i // 2, ids, torch.zeros(5), None, False) for i, ids in enumerate(sampled)]

    monkeypatch.setattr(rollout, "generate", given)
    ours, line = our_step(
        *(grpo, folder, rows, monkeypatch),
        **{
            "reward": (f"{folder}/score.py:score",),
            "prompts_per_step": 2,
            "group_size": 2,
            "max_new_tokens": 5,
        },
        **{"micro_batch_tokens": 1, "router_aux_loss_coef": COEFFICIENT, "seed": 0},
    )

    trainer = trl_grpo_step(
        folder, rows, sampled, group_advantages(torch.tensor(scores).view(2, 2)).flatten()
    )
    same_gradients(ours, {name: p.grad for name, p in trainer.model.named_parameters()})
    logged = trainer._metrics["train"]["aux_loss"]
    assert line["balance"] == pytest.approx(sum(logged) / 4, rel=1e-4)


def trl_grpo_step(folder, rows, sampled, advantages):
    """TRL's trainer after the backward passes of the samples, each a micro-batch of its own."""
    arguments = trl.GRPOConfig(
        output_dir=str(folder / "out"),
        **{
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 4,
            "num_generations": 2,
            "beta": 0.0,
        },
        **{"max_completion_length": 5, "use_cpu": True, "bf16": False, "report_to": "none"},
        **{"gradient_checkpointing": False, "router_aux_loss_coef": COEFFICIENT, "loss_type": "dapo"},
    )

    trainer = trl.GRPOTrainer(
        model=transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=arguments,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer_of(),
    )

    trainer.current_gradient_accumulation_steps = 4
    prompts = [tokenizer_of()(row["prompt"])["input_ids"] for row in rows]
    trainer.model.train()
    for i, ids in enumerate(sampled):
        inputs = {
            "prompt_ids": torch.tensor([prompts[our_prompt(rows, i)]]),
            "completion_ids": torch.tensor([ids]),
        }
        inputs |= {
            f"{part}_mask": torch.ones_like(inputs[f"{part}_ids"]) for part in ("prompt", "completion")
        }
        inputs |= {"advantages": advantages[i : i + 1], "num_items_in_batch": torch.tensor(20)}
        trainer._compute_loss(trainer.model, inputs).backward()
    return trainer


def our_prompt(rows, sample):
    """The row that a sample of the first rollout answers: `epochs` shuffles them."""
    from burnish.algorithms.run.order import epochs

    return next(epochs(len(rows), len(rows), 0))[sample // 2]


def test_a_model_without_experts_refuses_the_coefficient(tmp_path, monkeypatch):
    """TRL refuses it, too."""
    rows = [{"prompt": "w2", "completion": " w3"}]
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=60, num_key_value_heads=2, **sizes)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match="router_aux_loss_coef"):
        trl_step("SFT", tmp_path / "dense", rows, COEFFICIENT)
    tokenizer_of().save_pretrained(tmp_path / "dense")
    with pytest.raises(InputError, match=r"--router-aux-loss-coef: .*dense has no experts to balance"):
        our_step(sft, tmp_path / "dense", rows, monkeypatch, router_aux_loss_coef=COEFFICIENT)
