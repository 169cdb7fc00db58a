"""Write trl.json: what TRL's own loss code gives on stored tensors: `python tests/data/make_trl_golden.py`.

Made with trl 1.16.0, transformers 5.22.2, torch 2.13.0, on a CPU. Each trainer's method runs on a stand-in for the
trainer that has the settings it reads, and on a stand-in for the model that returns the stored log-probabilities.
"""

import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

BETA, SMOOTHING, GAMMA = 0.4, 0.15, 0.6
LENGTHS = [5, 2, 7, 4, 3, 6, 1, 7]  # of 4 chosen, then 4 rejected completions
LABELS = [True, True, False, True, False, False, True, False]  # of the same, for KTO
WIDTH = 1 + max(LENGTHS)  # a first token that nothing predicts, then a completion, then padding


def make_inputs() -> dict[str, list]:
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator)
    positions = torch.arange(WIDTH - 1)
    real = positions < torch.tensor(LENGTHS)[:, None]
    return {
        "lengths": LENGTHS,
        "labels": LABELS,
        "logprob": (-draw(8, WIDTH - 1).abs() * real).tolist(),  # of each token, 0 on padding
        "ref_logprob": (-draw(8, WIDTH - 1).abs() * real).sum(1).tolist(),  # of each completion
        "kl_logprob": (draw(8) - 4).tolist(),  # of completions of other prompts
        "ref_kl_logprob": (draw(8) - 4.5).tolist(),
        "scores": (2 * draw(8)).tolist(),  # a reward model's
        "margin": draw(4).abs().tolist(),
    }


BATCH = {"input_ids": torch.ones(8, WIDTH).long(), "attention_mask": torch.ones(8, WIDTH).long()}


def make_mask(inputs: dict[str, list]) -> torch.Tensor:
    """The completions' tokens of BATCH, (8, WIDTH)."""
    mask = torch.arange(WIDTH)[None] <= torch.tensor(inputs["lengths"])[:, None]
    mask[:, 0] = False
    return mask


def make_model(inputs: dict[str, list]) -> Callable[..., SimpleNamespace]:
    """A stand-in for a model that returns the stored log-probabilities."""
    logprob = torch.tensor(inputs["logprob"])
    outputs = SimpleNamespace(
        log_probs=logprob,
        entropy=torch.zeros_like(logprob),
        mean_logits=torch.zeros_like(logprob),
        is_top1=torch.zeros_like(logprob).bool(),
        label_mask=make_mask(inputs)[:, 1:],
    )
    return lambda **_: outputs


def trainer(**settings: Any) -> SimpleNamespace:
    """A stand-in for a trainer with these settings."""
    same = lambda x: x
    return SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(
            device=torch.device("cpu"), gather=same, gather_for_metrics=same, num_processes=1
        ),
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
        aux_loss_enabled=False,
        beta=BETA,
        precompute_ref_logps=True,
        **settings,
    )


def compute(inputs: dict[str, list]) -> dict[str, float]:
    """Name of a loss -> TRL's value."""
    from transformers import TrainingArguments  # noqa: F401 (fails first where transformers is missing)

    losses = of_pairs(inputs) | of_rows(inputs)
    return {name: loss.item() for name, loss in losses.items()}


def of_pairs(inputs: dict[str, list]) -> dict[str, torch.Tensor]:
    """The losses of a chosen and a rejected completion."""
    from trl import DPOTrainer
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

    logprob, ref = torch.tensor(inputs["logprob"]), torch.tensor(inputs["ref_logprob"])
    losses = {}
    for name, loss_type in [
        *(("dpo", "sigmoid"), ("robust", "robust"), ("hinge", "hinge"), ("ipo", "ipo")),
        *(("apo_zero", "apo_zero"), ("apo_down", "apo_down")),
    ]:
        settings = {"loss_types": [loss_type], "loss_weights": [1.0], "label_smoothing": SMOOTHING}
        dpo = trainer(ld_alpha=None, f_divergence_type="reverse_kl", use_weighting=False, **settings)
        given = {"completion_mask": make_mask(inputs).long()}
        given |= {"ref_chosen_logps": ref[:4], "ref_rejected_logps": ref[4:]}
        losses[name] = DPOTrainer._compute_loss(dpo, make_model(inputs), BATCH | given, False)

    total, mean = logprob.sum(1), logprob.sum(1) / torch.tensor(inputs["lengths"])
    for name, loss_type, smoothing, score in [
        ("cpo", "sigmoid", 0.0, total),
        ("simpo", "simpo", 0.0, mean),
        # TRL's DPOTrainer no longer has it; the formula is this one
        ("cdpo", "sigmoid", SMOOTHING, total - ref),
        # TRL's DPOTrainer averages; the formula on sums is this one
        ("ipo_sum", "ipo", 0.0, total - ref),
    ]:
        cpo = trainer(alpha=0.0, loss_type=loss_type, label_smoothing=smoothing, simpo_gamma=GAMMA)
        losses[name] = CPOTrainer.cpo_loss(cpo, score[:4], score[4:])[0].mean()
    losses["orpo"] = -ORPOTrainer.odds_ratio_loss(trainer(), mean[:4], mean[4:])[0].mean()
    return losses


def of_rows(inputs: dict[str, list]) -> dict[str, torch.Tensor]:
    """The losses of judged completions, a reward model's, and SFT's."""
    from trl import KTOTrainer, RewardTrainer, SFTTrainer

    model, losses = make_model(inputs), {}
    kto = trainer(loss_type="kto", desirable_weight=1.2, undesirable_weight=0.8, calculate_KL=True)
    kto._compute_kl_logps = lambda model, batch: torch.tensor(inputs["kl_logprob"])
    given = {"completion_mask": make_mask(inputs).long(), "label": torch.tensor(inputs["labels"])}
    given |= {
        "ref_logps": torch.tensor(inputs["ref_logprob"]),
        "ref_KL_logps": torch.tensor(inputs["ref_kl_logprob"]),
    }
    losses["kto"] = KTOTrainer._compute_loss(kto, model, BATCH | given, False)

    scores = SimpleNamespace(logits=torch.tensor(inputs["scores"])[:, None])
    for name, centering in [("bradley_terry", None), ("centered", 0.05)]:
        reward = trainer(args=SimpleNamespace(center_rewards_coefficient=centering))
        given = BATCH | {"margin": torch.tensor(inputs["margin"])}
        losses[name] = RewardTrainer.compute_loss(reward, lambda **_: scores, given)

    for name in ("nll", "dft"):
        args = SimpleNamespace(loss_type=name, average_tokens_across_devices=False)
        sft = trainer(args=args, compute_loss_func=None, label_smoother=None, get_tp_size=lambda: 1)
        sft.accelerator.parallelism_config = None
        losses[f"sft_{name}"] = SFTTrainer.compute_loss(sft, model, BATCH | {"labels": BATCH["input_ids"]})
    return losses


if __name__ == "__main__":
    inputs = make_inputs()
    golden = {
        "made_by": "tests/data/make_trl_golden.py with trl 1.16.0",
        "beta": BETA,
        "label_smoothing": SMOOTHING,
        "gamma": GAMMA,
        "inputs": inputs,
        "losses": compute(inputs),
    }
    Path(__file__).with_name("trl.json").write_text(json.dumps(golden, indent=1) + "\n")
