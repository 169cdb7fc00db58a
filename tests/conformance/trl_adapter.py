"""TRL's trainers for `burnish bench conformance tests/conformance/trl_adapter.py:adapter`.

A step is a run of SFTTrainer or DPOTrainer with TRL's defaults, but without activation checkpointing, mixed precision
and shuffling; its gradients are taken before the optimizer's step. Losses of tokens come from
GRPOTrainer._compute_loss, on a stand-in that has the settings it reads and returns the given log-probabilities, as
tests/data/make_trl_rl_golden.py does. Written for trl 1.16.0.
"""

import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import torch
import transformers
import trl
from burnish.bench.conformance import KL, Batch, Row, Step, Toy, Trainer
from peft import LoraConfig, PeftModel
from torch import Tensor

transformers.logging.set_verbosity_error()
datasets.disable_progress_bars()


def settings(folder: str, **more: Any) -> dict[str, Any]:
    common = {
        "output_dir": folder,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1e9,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "bf16": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return common | more


def tokenizer(toy: Toy) -> Any:
    return transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(toy.folder / "tokenizer.json"), eos_token="<eos>", pad_token=toy.pad
    )


def base_model(toy: Toy) -> Any:
    return transformers.LlamaForCausalLM.from_pretrained(toy.folder, dtype=torch.float32)


class Record(transformers.TrainerCallback):
    """Gradients before each optimizer step, and the losses that are logged."""

    def __init__(self) -> None:
        self.gradients: list[Tensor] = []
        self.losses: list[float] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any, **_: object) -> None:
        trained = [p for p in model.parameters() if p.requires_grad]
        self.gradients.append(
            torch.cat(
                [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in trained]
            ).clone()
        )

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: object) -> None:
        if "loss" in logs:
            self.losses.append(logs["loss"])

    def steps(self) -> list[Step]:
        return [Step(*pair) for pair in zip(self.losses, self.gradients, strict=True)]


def sft(toy: Toy, batch: Batch) -> Step:
    if batch.ranks > 1:
        return sharded(toy, batch)
    with tempfile.TemporaryDirectory() as folder:
        return sft_here(toy, batch, folder)


def sft_here(toy: Toy, batch: Batch, folder: str) -> Step:
    """One step of SFT in this process, which torchrun may have made one of several."""
    record = Record()
    at_once = batch.rows_at_once

    arguments = trl.SFTConfig(
        **settings(folder, max_steps=1, learning_rate=0.0),
        per_device_train_batch_size=1 if batch.packed else at_once,
        gradient_accumulation_steps=1 if batch.packed else -(-len(batch.rows) // (at_once * batch.ranks)),
        shuffle_dataset=False,
        packing=batch.packed,
        max_length=64 if batch.packed else batch.max_length,
        completion_only_loss=True,
        **({"ddp_backend": "gloo"} if batch.ranks > 1 else {}),
    )

    trainer = trl.SFTTrainer(
        model=base_model(toy),
        args=arguments,
        train_dataset=datasets.Dataset.from_list(batch.rows),
        processing_class=tokenizer(toy),
        callbacks=[record],
    )

    if batch.packed:
        assert len(trainer.train_dataset) == 1, "the rows did not fit one sequence"
    trainer.train()
    return record.steps()[0]


def sharded(toy: Toy, batch: Batch) -> Step:
    """Two processes of torchrun, with gloo; the first one's gradients, which are all-reduced."""
    with tempfile.TemporaryDirectory() as folder:
        torch.save((str(toy.folder), toy.pad, asdict(batch)), Path(folder) / "asked.pt")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={batch.ranks}", str(Path(__file__).resolve()), folder]
        done = subprocess.run(
            command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
        return Step(*torch.load(Path(folder) / "found.pt"))


def dpo(
    toy: Toy, pairs: list[Row], rows_at_once: int, steps: int, learning_rate: float, lora: str | None
) -> list[Step]:
    model, record = base_model(toy), Record()
    if lora == "loaded":
        model = PeftModel.from_pretrained(model, toy.adapter, is_trainable=True)
    extra = {"peft_config": LoraConfig(r=2, task_type="CAUSAL_LM")} if lora == "fresh" else {}

    with tempfile.TemporaryDirectory() as folder:
        arguments = trl.DPOConfig(
            **settings(folder, max_steps=steps, learning_rate=learning_rate),
            per_device_train_batch_size=rows_at_once,
            gradient_accumulation_steps=-(-len(pairs) // rows_at_once),
        )
        trl.DPOTrainer(
            model=model,
            args=arguments,
            train_dataset=datasets.Dataset.from_list(pairs),
            processing_class=tokenizer(toy),
            callbacks=[record],
            **extra,
        ).train()
    return record.steps()


def grpo_trainer(toy: Toy, folder: str, **more: Any) -> Any:
    return trl.GRPOTrainer(
        model=base_model(toy),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=trl.GRPOConfig(**settings(folder), **more),
        train_dataset=datasets.Dataset.from_list([{"prompt": "w3 w4 w5"}] * 8),
        processing_class=tokenizer(toy),
    )


def score(toy: Toy, prompts: list[list[int]], completions: list[list[int]], side: str | None) -> list[Tensor]:
    """GRPO's scoring. It pads prompts on the left and completions on the right; here one side has all the padding."""
    width = max(len(p) + len(c) for p, c in zip(prompts, completions, strict=True))
    ids, real = [], []
    for prompt, completion in zip(prompts, completions, strict=True):
        row, gap = prompt + completion, width - len(prompt) - len(completion)
        ids.append([1] * gap + row if side == "left" else row + [1] * gap)
        real.append([0] * gap + [1] * len(row) if side == "left" else [1] * len(row) + [0] * gap)

    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        trainer = grpo_trainer(toy, folder, num_generations=8, per_device_train_batch_size=8)
        scored, *_ = trainer._get_per_token_logps_and_entropies(
            trainer.model, torch.tensor(ids), torch.tensor(real), width - 1
        )

    found = []
    for row, prompt, completion in zip(scored, prompts, completions, strict=True):
        start = (width - len(prompt) - len(completion) if side == "left" else 0) + len(prompt)
        found.append(row[start - 1 : start - 1 + len(completion)])  # the first id is not scored
    return found


def rollout(
    toy: Toy, prompt: list[int], count: int, temperature: float, top_k: int | None
) -> tuple[Tensor, Tensor]:
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        trainer = grpo_trainer(
            toy,
            folder,
            num_generations=count,
            per_device_train_batch_size=count,
            max_completion_length=1,
            temperature=temperature,
            top_k=top_k or 0,
        )

        words = " ".join(f"w{i}" for i in prompt)
        batch = trainer._generate_and_score_completions([{"prompt": words}] * count)
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
        real = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
        scored, *_ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, real, 1)
    return batch["completion_ids"].squeeze(1), scored.squeeze(1)


def compute_loss(
    logprob: Tensor,
    old_logprob: Tensor,
    ref_logprob: Tensor,
    advantage: Tensor,
    mask: Tensor,
    num_tokens: int,
    beta: float = 0.0,
    use_bias_correction_kl: bool = False,
) -> Tensor:
    """GRPOTrainer's with loss_type "dapo", its default."""
    same = lambda x, **_: x
    outputs = (logprob, torch.zeros_like(logprob), None)
    defaults = trl.GRPOConfig

    stand_in = SimpleNamespace(
        model=SimpleNamespace(training=True),
        args=SimpleNamespace(
            delta=defaults.delta, use_bias_correction_kl=use_bias_correction_kl, steps_per_generation=1
        ),
        accelerator=SimpleNamespace(gather=same, reduce=same, gather_for_metrics=same, num_processes=1),
        _get_per_token_logps_and_entropies=lambda *_, **__: outputs,
        _metrics={"train": defaultdict(list)},
        _entropy_bonus_enabled=False,
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="token",
        beta=beta,
        loss_type="dapo",
        epsilon_low=defaults.epsilon,
        epsilon_high=defaults.epsilon,
        use_vllm=False,
        current_gradient_accumulation_steps=1,
    )

    ids = torch.ones_like(mask).long()
    batch = {
        "prompt_ids": ids[:, :1],
        "prompt_mask": ids[:, :1],
        "completion_ids": ids,
        "completion_mask": mask.long(),
        "advantages": advantage,
        "old_per_token_logps": old_logprob,
        "ref_per_token_logps": ref_logprob,
        "num_items_in_batch": torch.tensor(num_tokens),
    }

    return trl.GRPOTrainer._compute_loss(stand_in, None, batch)


def policy_loss(
    logprob: Tensor, old_logprob: Tensor, advantage: Tensor, mask: Tensor, num_tokens: int
) -> Tensor:
    return compute_loss(logprob, old_logprob, old_logprob, advantage, mask, num_tokens)


def kl_term(logprob: Tensor, ref_logprob: Tensor, corrected: bool) -> Tensor:
    """The loss where no sample has an advantage."""
    n = logprob.numel()
    one, nothing = torch.ones(n, 1, dtype=torch.bool), torch.zeros(n)
    old = logprob.detach()[:, None]
    return compute_loss(logprob[:, None], old, ref_logprob[:, None], nothing, one, n, 1.0, corrected)


def adapter() -> Trainer:
    return Trainer(
        name="TRL",
        version=version("trl"),
        sft=sft,
        dpo=dpo,
        score=score,
        padding_sides=("left", "right"),
        rollout=rollout,
        policy_loss=policy_loss,
        kl={
            "k3": KL(lambda lp, ref: kl_term(lp, ref, False), "KL(ref || pi)"),
            "k3, use_bias_correction_kl": KL(lambda lp, ref: kl_term(lp, ref, True), "KL(pi || ref)"),
        },
        absent={
            "shaped_rewards": "TRL 1.16 has no PPO",
            "advantages": "TRL 1.16 has no PPO",
        },
    )


if __name__ == "__main__":  # one of torchrun's processes, for `sharded`
    torch.set_num_threads(1)
    place = Path(sys.argv[1])
    model, pad, asked = torch.load(place / "asked.pt")
    step = sft_here(Toy(Path(model), Path(model), pad), Batch(**asked), str(place / "run"))
    if os.environ["RANK"] == "0":
        torch.save((step.loss, step.gradient), place / "found.pt")
