"""Burnish's own trainers for `burnish bench conformance tests/conformance/burnish_adapter.py:adapter`.

A step is a run of the algorithm's own `train`; its gradients are taken where the optimizer would use them.
"""

import importlib
import json
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from burnish.algorithms import ppo
from burnish.algorithms.objectives.advantages import gae
from burnish.algorithms.objectives.kl import k2_loss, k3_loss, rho_k3_loss
from burnish.algorithms.objectives.policy import clipped_loss
from burnish.algorithms.run import learner
from burnish.algorithms.sft import sft_loss
from burnish.bench.conformance import KL, Batch, Row, Step, Toy, Trainer, ids_of
from burnish.model.checkpoint import load_model
from burnish.model.generate import SamplingParams, generate
from burnish.model.packed import pack
from torch import Tensor


def flat_gradient(model: torch.nn.Module) -> Tensor:
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in trained]).clone()


def train(algorithm: str, rows: list[Row], **flags: object) -> list[Step]:
    module = importlib.import_module(f"burnish.algorithms.{algorithm}")
    gradients: list[Tensor] = []

    step = learner.optimizer_step

    def optimizer_step(model: torch.nn.Module, *rest: Any) -> float:
        gradients.append(flat_gradient(model))
        return step(model, *rest)

    with tempfile.TemporaryDirectory() as name, mock.patch.object(learner, "optimizer_step", optimizer_step):
        data = Path(name) / "rows.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        common = {"batch_size": len(rows), "schedule": "constant", "warmup_steps": 0, "device": "cpu"}
        module.train(module.Config(data=data, output=Path(name) / "run", **common, **flags))
        lines = (Path(name) / "run" / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    return [Step(*pair) for pair in zip(losses, gradients, strict=True)]


def capacity(rows: list[Row], rows_at_once: int) -> int:
    """--micro-batch-tokens that gives about so many rows to a micro-batch: Burnish counts tokens."""
    if rows_at_once == 1:
        return 1
    tokens = sum(len(" ".join(row.values()).split()) + len(row) - 1 for row in rows)
    return tokens if rows_at_once >= len(rows) else tokens * rows_at_once // len(rows)


def sft(toy: Toy, batch: Batch) -> Step:
    if batch.ranks > 1:
        return sharded(toy, batch)
    flags = {"model": toy.folder, "steps": 1, "max_length": batch.max_length}
    (step,) = train("sft", batch.rows, micro_batch_tokens=capacity(batch.rows, batch.rows_at_once), **flags)
    return step  # rows are always packed


def sharded(toy: Toy, batch: Batch) -> Step:
    """The ranks one after another, each on its rows, with the step's denominator; their gradients add up."""
    model, total = load_model(toy.folder), 0.0
    sequences = [(ids_of(row["prompt"]), [*ids_of(row["completion"]), 0]) for row in batch.rows]
    num_tokens = sum(len(completion) for _, completion in sequences)
    for rank in range(batch.ranks):
        packed = pack([prompt + completion for prompt, completion in sequences[rank :: batch.ranks]])
        trained = [t >= len(p) for p, c in sequences[rank :: batch.ranks] for t in range(len(p) + len(c))]
        loss = sft_loss(model.score(packed, torch.tensor(trained).nonzero().squeeze(1))[0], num_tokens)
        loss.backward()
        total += loss.item()
    return Step(total, flat_gradient(model))


def dpo(
    toy: Toy, pairs: list[Row], rows_at_once: int, steps: int, learning_rate: float, lora: str | None
) -> list[Step]:
    flags = {
        "model": toy.adapter if lora == "loaded" else toy.folder,
        "lora_rank": 2 if lora == "fresh" else 0,
    }
    flags |= {"micro_batch_tokens": capacity(pairs, rows_at_once), "steps": steps}
    return train("dpo", pairs, learning_rate=learning_rate, **flags)


def score(toy: Toy, prompts: list[list[int]], completions: list[list[int]], side: str | None) -> list[Tensor]:
    """Score all in one packed sequence."""
    packed = pack([prompt + completion for prompt, completion in zip(prompts, completions, strict=True)])
    lengths = [len(completion) for completion in completions]
    ends = packed.cu_seqlens[1:].tolist()
    rows = torch.cat([torch.arange(end - n, end) for end, n in zip(ends, lengths, strict=True)])
    with torch.no_grad():
        return list(load_model(toy.folder).score(packed, rows)[0].split(lengths))


def rollout(
    toy: Toy, prompt: list[int], count: int, temperature: float, top_k: int | None
) -> tuple[Tensor, Tensor]:
    """Scored as grpo and ppo do: the samples' own support, the prompt shared."""
    model = load_model(toy.folder)
    how = {"max_new_tokens": 1, "temperature": temperature, "top_k": top_k}
    samples = generate(model, [prompt], SamplingParams(samples_per_prompt=count, **how))
    packed = pack([prompt, *(sample.tokens for sample in samples)], [-1, *[0] * count])
    supports = [sample.support for sample in samples if sample.support is not None]
    rows = torch.arange(len(prompt), len(prompt) + count)
    with torch.no_grad():
        support = torch.cat(supports) if supports else None
        logprob, _, _ = model.score(packed, rows, temperature=temperature, support=support)
    return torch.tensor([sample.tokens[0] for sample in samples]), logprob


def policy_loss(
    logprob: Tensor, old_logprob: Tensor, advantage: Tensor, mask: Tensor, num_tokens: int
) -> Tensor:
    of_tokens = advantage[:, None].expand_as(mask)[mask]
    return clipped_loss(logprob[mask], old_logprob[mask], of_tokens, num_tokens)[0]


def shaped_rewards(score: Tensor, logprob: Tensor, ref_logprob: Tensor, mask: Tensor, beta: float) -> Tensor:
    return ppo.token_rewards(score, (logprob - ref_logprob) * mask, mask.sum(1), beta)


def adapter() -> Trainer:
    try:
        installed = version("burnish")
    except PackageNotFoundError:  # run from a checkout, by a link
        installed = "from source"

    return Trainer(
        name="Burnish",
        version=installed,
        sft=sft,
        dpo=dpo,
        score=score,
        rollout=rollout,
        policy_loss=policy_loss,
        kl={
            "k2": KL(lambda logprob, ref: k2_loss(logprob, ref, 1)[0], "KL(pi || ref)"),
            "k3": KL(lambda logprob, ref: k3_loss(logprob, ref, 1)[0], "KL(ref || pi)"),
            "rho k3": KL(lambda lp, ref: rho_k3_loss(lp, lp.detach(), ref, 1)[0], "KL(pi || ref)"),
        },
        shaped_rewards=shaped_rewards,
        advantages=lambda rewards, mask: gae(rewards, torch.zeros_like(rewards), mask, 1.0, 1.0),
    )
