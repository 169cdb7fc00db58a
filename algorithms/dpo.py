"""Direct preference optimization and its family.

    loss = sum over pairs f(w, l) / N            w, l: the scores of the chosen and the rejected completion

over the N pairs of the whole optimizer step. With h = w - l, and s = log pi(y|x), a sum over the completion's tokens:

    --loss     score                 f                                                     source
    dpo        s - s_ref             -log sigmoid(beta h)                                  2305.18290, eq. 7
    cdpo       s - s_ref             the same on labels of which a share e is flipped      ericmitchell.ai/cdpo.pdf
    robust     s - s_ref             the same, made unbiased again                         2403.00409
    hinge      s - s_ref             max(0, 1 - beta h)                                    2309.06657
    ipo        (s - s_ref) / length  (h - 1 / (2 beta))^2                                  2310.12036, eq. 17
    ipo_sum    s - s_ref             the same
    apo_zero   s - s_ref             1 - sigmoid(beta w) + sigmoid(beta l)                 2408.06266, eq. 7
    apo_down   s - s_ref             sigmoid(beta w) + 1 - sigmoid(beta h)                 2408.06266, eq. 8
    cpo        s                     -log sigmoid(beta h), and the NLL of w                2401.08417
    simpo      s / length            -log sigmoid(beta h - gamma)                          2405.14734, eq. 6
    orpo       s / length            -beta log sigmoid(logit e^w - logit e^l), and the NLL 2403.07691, eq. 6, 7

The reference is the model that training starts from. Its log-probabilities are computed once, in the batches of the
first epoch: the same sums in the same order, so at the start h is exactly 0 and DPO's loss log 2. A pair is one forward
pass: both completions continue the same prompt, and their first tokens are scored from its last row.

Metrics: loss, accuracy (share of pairs with w > l), margin, chosen, rejected (means of beta h, beta w, beta l),
chosen_logprob, rejected_logprob (means of s), grad_norm (before clipping), learning_rate; with experts, docs/moe.md's.

Source: Rafailov et al. 2023, https://arxiv.org/abs/2305.18290; the other papers are at https://arxiv.org/abs/NUMBER
Run:    burnish dpo --model DIR --data FILE.jsonl
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from math import ceil, inf
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..model.errors import InputError
from .data.pairs import (
    Preference,
    completion_logprobs,
    load_pairs,
    longest,
    micro_batches,
    num_tokens,
    pair_metrics,
    report_held_out,
)
from .run.balance import Balance
from .run.command import run_command
from .run.flags import TrainingFlags, load_tokenizer
from .run.loop import (
    Run,
    SaveDtype,
    Schedule,
    autocast,
    check_flags,
    check_model,
    default_device,
    epochs,
    make_optimizer,
    new_run_folder,
    optimizer_step,
    scheduled,
)
from .run.processes import shard, summed
from .run.trainee import ADAPTER_BOUNDS, load_trainee

Loss = Literal[
    "dpo", "cdpo", "robust", "hinge", "ipo", "ipo_sum", "apo_zero", "apo_down", "cpo", "simpo", "orpo"
]


@dataclass(frozen=True)
class Config(TrainingFlags):
    model: Path  # Hugging Face folder, or an adapter's, to start from; also the reference policy
    data: Path  # rows of chosen and rejected, perhaps prompt: .jsonl, .json or .parquet
    held_out: Path | None = None  # such rows, to report the accuracy on at the end
    output: Path = field(default_factory=lambda: new_run_folder("dpo"))  # new folder: metrics, model
    loss: Loss = "dpo"  # the table in algorithms/dpo.py says what each is
    beta: float | None = None  # by default 0.1; simpo 2
    label_smoothing: float | None = None  # e of cdpo and robust, by default 0.1: share of wrong labels
    gamma: float | None = None  # of simpo, by default 1: the margin that it asks for
    nll_weight: float | None = None  # of the NLL in cpo and orpo, by default 1
    max_length: int = 1024  # tokens of a prompt with either completion; longer rows are dropped and counted
    steps: int = 1000  # optimizer steps
    batch_size: int = 32  # pairs in one optimizer step
    micro_batch_tokens: int = 8192  # tokens in one forward and backward; gradients add up over micro-batches
    learning_rate: float = 1e-6  # AdamW's, at its peak
    schedule: Schedule = "linear"
    warmup_steps: int = 20  # of linear rise to learning_rate
    weight_decay: float = 0.0  # of matrices; vectors have none
    max_grad_norm: float = 1.0  # gradients are scaled down to it
    lora_rank: int = 0  # train an adapter of this rank in place of the weights; 0 trains the weights
    lora_alpha: float | None = None  # the adapter's scale is alpha / rank; 2 * rank by default
    lora_dropout: float = 0.0  # share of its inputs that the adapter does not see in training
    base_4bit: bool = False  # hold the frozen weights in 4 bits (NF4): QLoRA
    save_every: int = 0  # steps between checkpoints; 0 saves the model once, at the end
    save_dtype: SaveDtype = "auto"  # of what is written; auto: that of --model, tensor by tensor
    resume: bool = False  # go on from the last checkpoint in --output
    checkpoint_activations: bool = False  # run each layer again in the backward: less memory, more time
    seed: int = 0  # of the order of rows
    device: str = field(default_factory=default_device)


# Each loss: chosen, rejected (pairs,), the scores of the table above; num_pairs: of the whole optimizer step.


def dpo_loss(chosen: Tensor, rejected: Tensor, num_pairs: int, beta: float) -> Tensor:
    """Gradient: -beta sigmoid(-beta h) (grad chosen - grad rejected), on each pair."""
    return -F.logsigmoid(beta * (chosen - rejected)).sum() / num_pairs


def cdpo_loss(
    chosen: Tensor, rejected: Tensor, num_pairs: int, beta: float, label_smoothing: float | Tensor
) -> Tensor:
    """label_smoothing: scalar or (pairs,), the probability that the label is wrong. Its optimum is a finite h."""
    h = beta * (chosen - rejected)
    return -((1 - label_smoothing) * F.logsigmoid(h) + label_smoothing * F.logsigmoid(-h)).sum() / num_pairs


def robust_loss(
    chosen: Tensor, rejected: Tensor, num_pairs: int, beta: float, label_smoothing: float
) -> Tensor:
    """On labels flipped with probability label_smoothing < 1/2, in expectation DPO's loss on the true ones."""
    h = beta * (chosen - rejected)
    losses = -(1 - label_smoothing) * F.logsigmoid(h) + label_smoothing * F.logsigmoid(-h)
    return losses.sum() / (1 - 2 * label_smoothing) / num_pairs


def hinge_loss(chosen: Tensor, rejected: Tensor, num_pairs: int, beta: float) -> Tensor:
    return torch.relu(1 - beta * (chosen - rejected)).sum() / num_pairs


def ipo_loss(chosen: Tensor, rejected: Tensor, num_pairs: int, beta: float) -> Tensor:
    """beta is the paper's tau. `ipo` gives it log-ratios per token, as its authors do, `ipo_sum` the paper's sums."""
    return (chosen - rejected - 1 / (2 * beta)).square().sum() / num_pairs


def apo_zero_loss(chosen: Tensor, rejected: Tensor, num_pairs: int, beta: float) -> Tensor:
    """Raises chosen and lowers rejected: for chosen completions better than the model's own."""
    return (1 - torch.sigmoid(beta * chosen) + torch.sigmoid(beta * rejected)).sum() / num_pairs


def apo_down_loss(chosen: Tensor, rejected: Tensor, num_pairs: int, beta: float) -> Tensor:
    """Lowers both, rejected more: for chosen completions worse than the model's own."""
    return (torch.sigmoid(beta * chosen) + 1 - torch.sigmoid(beta * (chosen - rejected))).sum() / num_pairs


def simpo_loss(chosen: Tensor, rejected: Tensor, num_pairs: int, beta: float, gamma: float) -> Tensor:
    return -F.logsigmoid(beta * (chosen - rejected) - gamma).sum() / num_pairs


def orpo_loss(chosen: Tensor, rejected: Tensor, num_pairs: int, beta: float) -> Tensor:
    """The odds p / (1 - p) of the mean token probability p = exp(score); beta is the paper's lambda."""

    def log_odds(score: Tensor) -> Tensor:
        score = score.clamp(max=-1e-6)  # at p = 1 the odds are infinite
        return score - torch.log(-torch.expm1(score))

    return -beta * F.logsigmoid(log_odds(chosen) - log_odds(rejected)).sum() / num_pairs


def nll_loss(logprob: Tensor, num_tokens: Tensor | float) -> Tensor:
    """logprob (pairs,): sums over the chosen completions. num_tokens: of theirs in the whole optimizer step."""
    return -logprob.sum() / num_tokens


@dataclass(frozen=True)
class Variant:
    """What a loss is given, and the flags that it reads, None standing for those that it does not."""

    loss: Callable[..., Tensor]
    reference: bool = True  # the score is less the reference's
    per_token: bool = False  # the score is divided by the completion's length
    beta: float = 0.1
    label_smoothing: float | None = None
    gamma: float | None = None
    nll_weight: float | None = None

    def scores(self, logprob: Tensor, ref_logprob: Tensor, lengths: Tensor) -> Tensor:
        """Sums over completions and their numbers of tokens to w and l, each (pairs, 2)."""
        score = logprob - ref_logprob if self.reference else logprob
        return score / lengths if self.per_token else score

    def flags(self) -> dict[str, float]:
        values = {"beta": self.beta, "label_smoothing": self.label_smoothing, "gamma": self.gamma}
        return {name: value for name, value in values.items() if value is not None}


FLAGS = ("beta", "label_smoothing", "gamma", "nll_weight")
VARIANTS = {
    "dpo": Variant(dpo_loss),
    "cdpo": Variant(cdpo_loss, label_smoothing=0.1),
    "robust": Variant(robust_loss, label_smoothing=0.1),
    "hinge": Variant(hinge_loss),
    "ipo": Variant(ipo_loss, per_token=True),
    "ipo_sum": Variant(ipo_loss),
    "apo_zero": Variant(apo_zero_loss),
    "apo_down": Variant(apo_down_loss),
    "cpo": Variant(dpo_loss, reference=False, nll_weight=1.0),
    "simpo": Variant(simpo_loss, reference=False, per_token=True, beta=2.0, gamma=1.0),
    "orpo": Variant(orpo_loss, reference=False, per_token=True, nll_weight=1.0),
}


def train(cfg: Config) -> Path:
    """Returns the folder of the trained model."""
    check_flags(
        cfg,
        beta=(1e-9, inf),
        label_smoothing=(0, 0.499),
        **dict.fromkeys(("gamma", "nll_weight", "learning_rate", "warmup_steps", "weight_decay"), (0, inf)),
        max_length=(2, inf),
        steps=(1, inf),
        batch_size=(1, inf),
        micro_batch_tokens=(1, inf),
        max_grad_norm=(1e-12, inf),
        **ADAPTER_BOUNDS,
        lora_dropout=(0, 0.99),
        save_every=(0, inf),
        seed=(0, 2**63 - 1),
    )
    variant = _variant(cfg)
    tokenizer = load_tokenizer(cfg)
    pairs, held_out = (load_pairs(path, tokenizer, cfg) for path in (cfg.data, cfg.held_out))
    model = load_trainee(cfg)
    check_model(model, tokenizer, [*pairs, *held_out], max(map(longest, pairs)))
    balance = Balance(cfg, model)
    shard(model)
    optimizer = make_optimizer(model, cfg.learning_rate, cfg.weight_decay)

    def logprobs(pairs: list[Preference]) -> Tensor:  # of chosen and rejected, (pairs, 2)
        return completion_logprobs(model, pairs, cfg.micro_batch_tokens, cfg.device)

    reference = torch.zeros(len(pairs), 2)
    if variant.reference:
        first_epoch = epochs(len(pairs), cfg.batch_size, cfg.seed)
        for _ in range(min(cfg.steps, ceil(len(pairs) / cfg.batch_size))):
            members = next(first_epoch)
            reference[members] = logprobs([pairs[i] for i in members])
    before = logprobs(held_out)
    with Run(cfg, model=model, optimizer=optimizer) as run:
        batches = epochs(len(pairs), cfg.batch_size, cfg.seed, skip=run.start)
        for step in run.steps():
            members = next(batches)
            batch = [pairs[i] for i in members]
            num_chosen = sum(sum(pair.chosen.mask) for pair in batch)  # tokens
            sums: dict[str, float] = {}
            for micro in micro_batches(batch, cfg.micro_batch_tokens, cfg.device):
                with autocast(cfg.device):
                    logprob, _, _ = model.score(micro.packed, micro.rows)  # (tokens,)
                total = micro.sums(logprob).view(-1, 2)  # (pairs, 2)
                ref = reference[[members[i] for i in micro.members]].to(cfg.device)
                chosen, rejected = variant.scores(total, ref, micro.lengths.view(-1, 2)).unbind(1)
                loss = variant.loss(chosen, rejected, len(batch), **variant.flags())
                if variant.nll_weight:
                    loss = loss + variant.nll_weight * nll_loss(total[:, 0], num_chosen)
                (loss + balance.loss(micro.share)).backward()  # of experts, where the model has some
                mean = total.detach().sum(0) / len(batch)
                added = {
                    "loss": loss.item(),
                    **pair_metrics(variant.beta * chosen, variant.beta * rejected, len(batch)),
                    "chosen_logprob": mean[0].item(),
                    "rejected_logprob": mean[1].item(),
                }
                sums = {name: sums.get(name, 0.0) + value for name, value in added.items()}
            sums = summed(sums)
            rate = scheduled(cfg.learning_rate, step, cfg.steps, cfg.warmup_steps, cfg.schedule)
            norm = optimizer_step(model, optimizer, sums["loss"], rate, cfg.max_grad_norm)
            sums |= {"grad_norm": norm, "learning_rate": rate, **balance.metrics()}
            run.log(sums, tokens=sum(num_tokens(pair) for pair in batch))
            run.save_step(model, tokenizer)
        if held_out:
            after = logprobs(held_out)
            lengths = torch.tensor([[sum(c.mask) for c in pair.completions] for pair in held_out])
            scores = variant.beta * variant.scores(after, before, lengths)
            report_held_out(run.folder, logprob_before=before, logprob_after=after, score_after=scores)
        return run.save(model, tokenizer)


def _variant(cfg: Config) -> Variant:
    """The loss with the flags that were given. Raises InputError for one that it would not read."""
    variant = VARIANTS[cfg.loss]
    given = {name: getattr(cfg, name) for name in FLAGS if getattr(cfg, name) is not None}
    for name in given:
        if getattr(variant, name) is None:
            readers = ", ".join(loss for loss, other in VARIANTS.items() if getattr(other, name) is not None)
            raise InputError(f"--{name.replace('_', '-')}: --loss {cfg.loss} does not read it; {readers} do")
    return replace(variant, **given)


if __name__ == "__main__":
    sys.exit(run_command("dpo", sys.modules[__name__], train, sys.argv[1:]))
