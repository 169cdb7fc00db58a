"""Training as two processes do it and as one does, for test_distributed.py.

Run as a script, which torchrun does, this file is what the processes do; a test compares it with one process.
"""

import os
import shutil
import signal
import sys
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
from burnish.algorithms import distill, dpo, grpo, kto, ppo, reward, sft
from burnish.algorithms.run import learner
from burnish.algorithms.run.batch import over_completions
from burnish.algorithms.run.loop import Run
from burnish.algorithms.run.processes import processes, rank, shard, world
from burnish.model.adapter import adapters, add_lora, quantize_base
from burnish.model.checkpoint import load_model, stream_weights
from burnish.model.config import Experts
from burnish.model.linear import whole
from burnish.model.transformer import Transformer
from safetensors.torch import save_file

MODULES = {
    "sft": sft,
    "reward": reward,
    "dpo": dpo,
    "kto": kto,
    "ppo": ppo,
    "grpo": grpo,
    "distill": distill,
}
DATA = {
    "sft": "demonstrations",
    "reward": "pairs",
    "dpo": "pairs",
    "kto": "judged",
    "ppo": "prompts",
    "grpo": "prompts",
    "distill": "demonstrations",
}
FOLDERS = ("data", "eval_data", "teacher", "critic", "reward_model")  # flags that name a file or a folder
EXPERTS = Experts(3, 2, 24, (True, True), renormalize=True, balance_coefficient=0.01)  # 3: uneven shares
SHAPES = {
    "tied": {},
    "untied": {"tie_word_embeddings": False},
    "experts": {"model_type": "mixtral", "experts": EXPERTS},
    "wide": {
        "hidden_size": 72,
        "intermediate_size": 89,
    },  # large enough for 8-bit moments; uneven shares of rows
}
COMMON = {"steps": 3, "learning_rate": 3e-3, "schedule": "constant", "warmup_steps": 0, "device": "cpu"}
EVALUATED = {"eval_every": 2}  # beside "eval_data": before training, and after two and three steps
SFT = {"batch_size": 24, "micro_batch_tokens": 100}  # a few rounds
RL = {
    "prompts_per_step": 5,
    "group_size": 4,
    "max_new_tokens": 8,
    "updates_per_rollout": 2,
    "micro_batch_tokens": 80,
    "reward": "odd.py:odd",
}
PPO = {
    "prompts_per_step": 9,
    "group_size": 2,
    "max_new_tokens": 8,
    "epochs_per_rollout": 2,
    "minibatches": 2,
    "micro_batch_tokens": 60,
}
CASES = {  # name: (algorithm, shape of the model, flags)
    "sft": (
        "sft",
        "tied",
        {
            **SFT,
            "weight_decay": 0.1,
            "checkpoint_activations": True,
            "eval_data": "demonstrations.jsonl",
            "loss": "dft",
        },
    ),
    "sft-lora": ("sft", "untied", {**SFT, "lora_rank": 3}),
    "sft-dora": (
        "sft",
        "untied",
        {
            **SFT,
            "lora_rank": 3,
            "lora_dora": True,
            "lora_rslora": True,
            "lora_targets": ("q_proj", "down_proj", "lm_head"),
        },
    ),
    "sft-head": ("sft", "adapted-head", SFT),  # the base's embedding is also the head under an adapter
    "grpo-head": ("grpo", "adapted-head", {**RL, "kl_coefficient": 0.1}),
    "sft-experts": (
        "sft",
        "experts",
        {"batch_size": 5, "micro_batch_tokens": 1},
    ),  # each row alone: the same balance
    "sft-experts-lora": ("sft", "experts", {"batch_size": 5, "micro_batch_tokens": 1, "lora_rank": 3}),
    "reward": (
        "reward",
        "untied",
        {
            **SFT,
            "batch_size": 25,
            "eval_data": "pairs.jsonl",
            "centering": 0.1,
            "checkpoint_activations": True,
        },
    ),
    "reward-qlora": ("reward", "tied", {**SFT, "lora_rank": 4, "base_4bit": True}),
    "reward-experts": ("reward", "experts", {"batch_size": 1}),  # one of the processes has nothing to do
    "dpo": ("dpo", "untied", {**SFT, "batch_size": 25, "eval_data": "pairs.jsonl", "beta": 1.0}),
    "dpo-qlora": ("dpo", "tied", {**SFT, "lora_rank": 4, "base_4bit": True}),
    "dpo-experts-qlora": (
        "dpo",
        "experts",
        {"batch_size": 4, "micro_batch_tokens": 1, "lora_rank": 3, "base_4bit": True},
    ),
    "kto": (
        "kto",
        "untied",
        {**SFT, "batch_size": 25, "beta": 1.0, "wanted_weight": 1.3, "eval_data": "judged.jsonl"},
    ),
    "kto-qlora": ("kto", "tied", {**SFT, "lora_rank": 4, "base_4bit": True}),
    "kto-idle": ("kto", "tied", {"batch_size": 1}),  # one of the processes has nothing to do
    "grpo": (
        "grpo",
        "tied",
        {**RL, "kl_coefficient": 0.1, "max_draws": 2, "top_k": 9, "eval_data": "prompts.jsonl"},
    ),
    "grpo-lora": ("grpo", "untied", {**RL, "lora_rank": 4, "kl_coefficient": 0.1, "loss": "gspo"}),
    "grpo-experts": (
        "grpo",
        "experts",
        {**RL, "prompts_per_step": 1},
    ),  # one of the processes has nothing to do
    "ppo": (
        "ppo",
        "tied",
        {
            **PPO,
            "reward_model": "scores",
            "kl_target": 0.01,
            "kl_horizon": 20,
            "whiten_rewards": True,
            "missing_end_penalty": 0.5,
            "critic_learning_rate": 3e-3,
            "checkpoint_activations": True,
            "eval_data": "prompts.jsonl",
        },
    ),
    "ppo-qlora": (
        "ppo",
        "untied",
        {**PPO, "reward": "odd.py:odd", "lora_rank": 4, "base_4bit": True, "critic": "tied", "top_k": 9},
    ),
    "ppo-experts": (
        "ppo",
        "experts",
        {**PPO, "reward": "odd.py:odd", "advantage": "rloo", "prompts_per_step": 1, "minibatches": 1},
    ),
    "distill": (
        "distill",
        "tied",
        {
            **SFT,
            "teacher": "untied",
            "student_samples": 0.5,
            "max_new_tokens": 8,
            "beta": 0.3,
            "seed": 1,
            "eval_data": "demonstrations.jsonl",
        },
    ),
    "distill-experts": (  # each row alone: the same balance
        "distill",
        "experts",
        {
            "batch_size": 5,
            "micro_batch_tokens": 1,
            "teacher": "tied",
            "student_samples": 1.0,
            "max_new_tokens": 8,
            "loss": "policy_gradient",
            "eval_data": "demonstrations.jsonl",
        },
    ),
    "distill-qlora": (
        "distill",
        "untied",
        {**SFT, "teacher": "experts", "lora_rank": 4, "base_4bit": True, "checkpoint_activations": True},
    ),
    # Muon gathers the rows of a matrix, and the rows of an adapter; three experts are uneven shares
    "sft-muon": ("sft", "wide", {**SFT, "optimizer": "muon", "weight_decay": 0.1}),
    "sft-muon-experts": (
        "sft",
        "experts",
        {"batch_size": 5, "micro_batch_tokens": 1, "optimizer": "muon"},
    ),
    "ppo-muon-qlora": (
        "ppo",
        "untied",
        {**PPO, "reward": "odd.py:odd", "lora_rank": 4, "base_4bit": True, "optimizer": "muon"},
    ),
    "sft-8bit": (  # where rounding moves a moment to the next code, a step differs by some percent of the rate
        "sft",
        "wide",
        {**SFT, "optimizer": "adamw8bit", "weight_decay": 0.1, "learning_rate": 1e-4},
    ),
    "distill-stored": ("distill", "tied", {"batch_size": 1, "data": "lessons.safetensors"}),  # one is idle
}


def config(name: str, folder: Path, **changes):
    algorithm, shape, flags = CASES[name]
    given = {"model": folder / shape, "data": f"{DATA[algorithm]}.jsonl", **COMMON, **flags, **changes}
    given |= EVALUATED if "eval_data" in given else {}
    given |= {flag: folder / given[flag] for flag in FOLDERS if flag in given}
    if "reward" in given:
        given["reward"] = (f"{folder}/{given['reward']}",)
    return MODULES[algorithm].Config(**given)


@contextmanager
def kept_gradients(file: Path):
    """The first step's of each model, whole, in `file`."""
    step, found, models = learner.optimizer_step, {}, []

    def keep(model, *rest):
        if not any(model is earlier for earlier in models):
            models.append(model)
            for name, p in model.named_parameters():
                if p.grad is not None:
                    found[f"{len(models)}/{name}"] = whole(p.grad).clone()
        return step(model, *rest)

    learner.optimizer_step = keep
    try:
        yield
    finally:
        learner.optimizer_step = step
    if rank() == 0:
        save_file(found, file)


def train(name: str, folder: Path, output: str) -> None:
    cfg = config(name, folder, output=folder / output / name)
    cfg.output.parent.mkdir(exist_ok=True)
    with kept_gradients(folder / output / f"{name}.safetensors"):
        MODULES[CASES[name][0]].train(cfg)


def of_this_process(*given) -> torch.Tensor:
    """`over_completions` without the sum over processes: of other processes' completions zeros."""
    with patch("burnish.algorithms.run.batch.sum_over_processes", lambda values: values):
        return over_completions(*given)


FAULTS = {  # by trainer: what is wrong, and what it does in its place
    "sft": (  # FSDP's own mean over processes
        "torch.distributed.fsdp.FSDPModule.set_gradient_divide_factor",
        lambda module, factor: None,
    ),
    "kto": (  # z from the process's own completions
        "burnish.algorithms.kto.over_completions",
        of_this_process,
    ),
    "ppo": (  # advantages whitened over the process's own tokens
        "burnish.algorithms.run.batch.sum_over_processes",
        lambda values: values,
    ),
}
RESUMED = (
    "sft-lora",
    "reward",
    "distill",
    "ppo",
    "sft-muon",
    "sft-muon-experts",
    "ppo-muon-qlora",
    "sft-8bit",
)


def checkpointed(folder: Path, output: str, name: str = "sft-lora", **changes) -> Path:
    cfg = config(name, folder, output=folder / output / name, save_every=2, **{"steps": 4} | changes)
    return MODULES[CASES[name][0]].train(cfg)


def stopped(folder: Path, name: str = "sft-lora") -> None:
    """Send a SIGTERM to rank 1 alone in its third step, which is no step of --save-every; then resume."""
    log = Run.log

    def log_and_stop(run: Run, *given) -> None:
        log(run, *given)
        if rank() == 1 and run._step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with patch.object(Run, "log", log_and_stop):
        try:
            checkpointed(folder, "stopped", name)
        except SystemExit as end:
            assert end.code == 143
        else:
            raise AssertionError("expected the end of the run")
    if rank() == 0:
        shutil.copytree(folder / "stopped", folder / "stopped-at-3")
    checkpointed(folder, "stopped", name, resume=True)


def trained_adapter(folder: Path) -> Transformer:
    """A model of which an adapter and the head are trained, both by random numbers."""
    model = load_model(folder / "untied")
    quantize_base(model)
    add_lora(model, 3, dora=True, modules_to_save=("lm_head",))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for lora in adapters(model).values():
            lora.b.normal_(std=0.1, generator=generator)
        model.lm_head.weight.normal_(generator=generator)
    return model


def work(folder: Path) -> None:
    """All that two processes do for the tests below, in one start."""
    torch.set_num_threads(1)
    with processes("sft", "cpu"):
        assert world() == 2
        for name in CASES:
            train(name, folder, "two")
        for name, fault in FAULTS.items():
            with patch(*fault):
                train(name, folder, "faulty")

        for name in RESUMED:
            checkpointed(folder, "whole", name)
            checkpointed(folder, "cut", name, steps=2)
        if rank() == 0:
            shutil.copytree(folder / "cut", folder / "cut-for-one")
        for name in RESUMED:
            checkpointed(folder, "cut", name, resume=True)
            checkpointed(folder, "cut-by-one", name, resume=True)
        stopped(folder)

        model = trained_adapter(folder)
        shard(model)
        streamed = dict(stream_weights(model))
        if rank() == 0:
            save_file(streamed, folder / "streamed.safetensors")


if __name__ == "__main__":
    work(Path(sys.argv[1]))
