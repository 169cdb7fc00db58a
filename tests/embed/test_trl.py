"""TRL's trainers on an embedded model: every figure that they log over three steps is what it was."""

import random
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from burnish.model import InputError, embed
from burnish.model.embedding import attention, operands

pytest.importorskip("transformers", reason="transformers is not installed")
trl = pytest.importorskip("trl", reason="trl is not installed")
datasets = pytest.importorskip("datasets", reason="datasets is not installed")
import transformers  # noqa: E402 (skipped above where it is missing)

CLOCK = ("runtime", "per_second", "time", "flops", "mfu")  # what a log line says of the machine


@pytest.fixture
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<pad>": 0, "<eos>": 1} | {f"w{i}": i for i in range(2, 96)}
    plain = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<eos>", pad_token="<pad>")


@pytest.fixture
def rows():
    draw = random.Random(0)

    def words(least, most):
        return " ".join(f"w{draw.randrange(2, 96)}" for _ in range(draw.randint(least, most)))

    return [
        {"prompt": words(2, 6), "completion": words(2, 8), "chosen": words(2, 8), "rejected": words(2, 8)}
        for _ in range(12)
    ]


def even(completion_ids, **_):
    return [sum(i % 2 == 0 for i in ids) / max(1, len(ids)) for ids in completion_ids]


def train(folder, model, embedded=None, *, rows, tokenizer, output, peft_config=None, **more):
    """Train with the trainer `folder` ("SFT", ...): what it logs in each of three steps, and itself.

    embedded: "before" the trainer is built, "after", or not at all. A reference that it makes is there after.
    """
    if embedded == "before":
        embed.apply(model)

    columns = {
        "SFT": ["prompt", "completion"],
        "DPO": ["prompt", "chosen", "rejected"],
        "GRPO": ["prompt"],
        "Reward": ["chosen", "rejected"],
    }[folder]

    settings = {"GRPO": {"num_generations": 4, "max_completion_length": 6}}.get(folder, {})
    arguments = getattr(trl, f"{folder}Config")(
        output_dir=str(output),
        max_steps=3,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **settings | {"bf16": False, "gradient_checkpointing": False} | more,
    )

    torch.manual_seed(0)
    trainer = getattr(trl, f"{folder}Trainer")(
        model=model,
        args=arguments,
        train_dataset=datasets.Dataset.from_list([{c: row[c] for c in columns} for row in rows]),
        processing_class=tokenizer,
        peft_config=peft_config,
        **({"reward_funcs": even} if folder == "GRPO" else {}),
    )

    if embedded == "after":
        embed.apply(trainer.model)
    if embedded and getattr(trainer, "ref_model", None) is not None:
        embed.apply(trainer.ref_model)

    trainer.train()
    logged = [line for line in trainer.state.log_history if "loss" in line]
    return [
        {k: v for k, v in line.items() if not any(word in k for word in CLOCK)} for line in logged
    ], trainer


@pytest.fixture
def trained(rows, tokenizer, tmp_path):
    """trained(folder, model, embedded, **more): `train` on the rows above."""
    return partial(train, rows=rows, tokenizer=tokenizer, output=tmp_path)


def same(got, want):
    assert len(got) == len(want) == 3
    for g, w in zip(got, want, strict=True):
        assert g == pytest.approx(w, rel=1e-5, abs=1e-5)


@pytest.fixture
def calls(monkeypatch):
    calls = SimpleNamespace(token_logprobs=0, flash_attention=0)

    def counted(op, original):
        def call(*args, **kwargs):
            setattr(calls, op, getattr(calls, op) + 1)
            return original(*args, **kwargs)

        return call

    for file, op in ((operands, "token_logprobs"), (attention, "flash_attention")):
        monkeypatch.setattr(file, op, counted(op, getattr(file, op)))
    return calls


@pytest.mark.parametrize(
    "name, folder, more, embedded",
    [
        ("llama", "SFT", {}, "before"),
        ("qwen3", "SFT", {"packing": True, "max_length": 16}, "after"),
        ("qwen3_moe", "SFT", {"router_aux_loss_coef": 0.1, "gradient_checkpointing": True}, "before"),
        ("llama", "DPO", {}, "after"),
        ("mistral-sw", "DPO", {"use_weighting": True}, "before"),
        ("llama", "GRPO", {"beta": 0.04, "temperature": 0.8}, "after"),
        ("gpt_oss", "GRPO", {"temperature": 0.8}, "before"),
    ],
)
def test_logged_figures(load, trained, calls, name, folder, more, embedded):
    want, _ = trained(folder, load(name), **more)
    assert calls.token_logprobs == calls.flash_attention == 0
    got, trainer = trained(folder, load(name), embedded, **more)
    same(got, want)
    assert calls.flash_attention and calls.token_logprobs >= 3 * (1 + (folder == "DPO"))
    assert want[0]["loss"] != want[2]["loss"]
    embed.remove(trainer.model)


@pytest.mark.parametrize("folder, embedded", [("SFT", "before"), ("DPO", "after"), ("GRPO", "before")])
def test_adapters(load, trained, calls, folder, embedded):
    """The trainer puts the adapter on: before it is built the model is transformers' own, after it PEFT's."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    lora = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    more = {"peft_config": lora} | ({"beta": 0.1} if folder == "GRPO" else {})
    runs = []
    for how in (None, embedded):
        torch.manual_seed(0)
        runs.append(trained(folder, load("llama"), how, **more)[0])
        assert bool(how) == bool(calls.token_logprobs)
    same(runs[1], runs[0])
    assert calls.token_logprobs >= 3


def test_reward_model(data, trained, calls):
    def model():
        torch.manual_seed(0)
        make = transformers.AutoModelForSequenceClassification.from_pretrained
        return make(data / "tiny-hf" / "llama", num_labels=1, dtype=torch.float32)

    want, _ = trained("Reward", model())
    got, _ = trained("Reward", model(), "before")
    same(got, want)
    assert calls.flash_attention and not calls.token_logprobs


def test_mixed_precision(load, trained, calls):
    """accelerate lays a forward of its own, autocast, over TRL's, which lies over ours."""
    want, got = (trained("SFT", load("llama"), how, bf16=True)[0] for how in (None, "before"))
    assert calls.token_logprobs == 3
    for g, w in zip(got, want, strict=True):
        assert g["loss"] == pytest.approx(w["loss"], abs=2e-2)


def test_removed_below_a_trainer(load, trained, calls):
    """remove() takes off what lies below TRL's forward and leaves that; apply() then goes over it."""
    model = load("llama")
    _, trainer = trained("SFT", model, "before")
    assert trainer.model is model and calls.token_logprobs == 3
    embed.remove(model)
    seen = vars(calls).copy()
    ids = torch.arange(2, 12)[None]
    model.train()
    assert model(ids, labels=ids).logits is not None
    want = model(ids, labels=ids, fused_lm_head=True).log_probs
    assert vars(calls) == seen
    embed.apply(model)
    assert model(ids, labels=ids).logits is None
    torch.testing.assert_close(model(ids, labels=ids, fused_lm_head=True).log_probs, want)
    assert calls.token_logprobs == seen["token_logprobs"] + 2


def test_an_adapter_that_trl_does_not_see_is_named(load):
    """TRL scores with lm_head.weight, which is the base's; of modules_to_save, it is that of the trained copy."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    ids = torch.arange(2, 12)[None]

    def score(options):
        model = load("llama").train()
        trl.trainer.utils.add_fused_lm_head(model)
        wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, **options))
        embed.apply(wrapped)
        return wrapped.base_model(ids, labels=ids, fused_lm_head=True).log_probs

    with pytest.raises(InputError, match=r"lm_head: TRL would ignore its adapter.*modules_to_save"):
        score({"target_modules": ["lm_head"]})
    assert score({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}).isfinite().all()


@pytest.mark.parametrize("embedded", ["before", "after"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_per_token_figures(load, ids, calls, temperature, embedded):
    """All five of TRL's, with labels that are the likeliest token and labels that are not."""
    model = load("llama").train()
    parts = dict.fromkeys(("attention", "rope", "norm", "swiglu"), False)
    with torch.no_grad():
        model.lm_head.weight.mul_(5)  # some tokens above one half
        labels = ids.clone()
        labels[:, 1::3] = model(ids).logits.argmax(-1)[:, 0::3][:, : labels[:, 1::3].shape[1]]
        labels[0, :5], labels[2] = -100, -100
    if embedded == "before":
        embed.apply(model, **parts)
    names = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
    trl.trainer.utils.add_fused_lm_head(model, temperature=temperature, outputs=names)

    def run():
        model.zero_grad()
        out = model(ids, labels=labels, fused_lm_head=True)
        (out.loss + out.entropy.square().mean()).backward()
        assert 0 < out.is_top1.sum() < out.label_mask.sum()
        gradients = [p.grad.clone() for p in model.parameters()]
        return [out.loss.detach(), *(getattr(out, name).detach() for name in names), *gradients]

    if embedded == "before":
        ours = run()
        embed.remove(model)
    theirs = run()
    if embedded == "after":
        embed.apply(model, **parts)
        ours = run()
    assert calls.token_logprobs == 2  # the sum of p^2 is one more
    for got, want in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got.to(want.dtype), want, rtol=1e-5, atol=1e-5)


def test_another_version_of_the_head_is_named(load):
    model = load("llama")

    def _fused_forward(self, *args, **kwargs):
        return None

    model.forward = _fused_forward.__get__(model)
    with pytest.raises(InputError, match=r"trl: expected the head of version 1\.16"):
        embed.apply(model)
