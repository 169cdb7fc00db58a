"""The memory that a training run will take, by purpose, before it is started.

Only config.json of each model is read. model/memory.py says what is counted, and how. A run has two phases: the update,
with gradients and activations, and for methods that sample the sampling, with its cache. The larger one counts.

Run:    burnish memory --model DIR --method sft --lora-rank 16 --base-4bit
"""

import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import partial
from math import ceil
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch

from ..model.batch import MEMORY_BUDGET, PREFILL_TOKENS
from ..model.cache import cache_bytes
from ..model.config import ModelConfig
from ..model.errors import InputError, shown
from ..model.files.config_json import read_config
from ..model.files.folder import is_adapter, way_to_fetch
from ..model.files.formats import is_bnb_4bit
from ..model.files.text_files import read_object
from ..model.memory import Memory, Training, frozen_memory, kinds_of, training_memory, with_layers
from .run.checks import check_number
from .run.command import run_command
from .run.flags import AdapterFlags, Count, DeviceFlags, OptimizerName, Rate, Share, bounds
from .run.optimizer import state_bytes
from .run.trainee import planned_adapter

Method = Literal["sft", "dpo", "kto", "reward", "grpo", "ppo", "distill"]
MICRO_BATCH_TOKENS = {"grpo": 16384, "ppo": 16384}  # the methods' defaults; 8192 for the others
PROMPTS = {"grpo": (16, 8), "ppo": (64, 1), "distill": (32, 1)}  # prompts a step, and samples of each
ONLY_OF = {  # flags that other methods do not have
    "critic": ("ppo",),
    "reward_model": ("ppo",),
    "advantage": ("ppo",),
    "teacher": ("distill",),
    "student_samples": ("distill",),
    "kl_coefficient": ("grpo", "ppo"),
    "prompts_per_step": ("grpo", "ppo"),
    "group_size": ("grpo", "ppo"),
    "sampling_batch_size": ("grpo", "ppo", "distill"),
}
SMALLER: tuple[dict[str, Any], ...] = (  # flags that save memory, in the order of docs/fit-into-memory.md
    {"micro_batch_tokens": 4096},
    {"checkpoint_activations": True},
    {"sampling_batch_size": 16},
    {"lora_rank": 16},
    {"base_4bit": True},
)


@dataclass(frozen=True, kw_only=True)
class Config(AdapterFlags, DeviceFlags):
    group: ClassVar = "run"

    model: Path  # Hugging Face folder of the model; only its config.json is read
    method: Method = "sft"  # command that will train
    optimizer: OptimizerName = "adamw"  # optimizer; docs/optimizers.md compares them
    micro_batch_tokens: Count | None = None  # tokens per forward and backward pass; by default the method's
    checkpoint_activations: bool = False  # recompute layers in the backward pass: less memory, more time
    processes: Count = 1  # processes that share the weights; the result is for each of them
    critic: Path | None = (
        None  # of ppo: folder the critic starts from; default: --reward-model, or else --model
    )
    reward_model: Path | None = None  # of ppo: folder of a reward model
    advantage: Literal["gae", "rloo", "reinforce_pp"] = "gae"  # of ppo: only gae has a critic
    teacher: Path | None = None  # of distill: folder of the teacher
    student_samples: Share = 0.0  # of distill: share of steps on the student's samples
    kl_coefficient: Rate = 0.0  # of grpo and ppo: above 0, grpo keeps a reference, as ppo always does
    prompts_per_step: Count | None = None  # of grpo and ppo: prompts per rollout; by default the method's
    group_size: Count | None = None  # of grpo and ppo: samples per prompt; by default the method's
    sampling_batch_size: Count | None = None  # samples generated at a time; by default as many as fit
    max_prompt_length: Count = 1024  # number of prompt tokens to make room for
    max_new_tokens: Count = 256  # maximum number of tokens in a completion

    @property
    def seed(self) -> int:
        return 0  # of an adapter that no run ever sees


@dataclass(frozen=True)
class Estimate:
    """The memory of a run in bytes, by purpose."""

    kept: dict[str, int]  # there all the time
    update: dict[str, int]  # while a step's gradients are computed and applied
    sampling: dict[str, int]  # while completions are sampled; empty for methods that do not sample

    @property
    def total(self) -> int:
        return sum(self.kept.values()) + max(sum(self.update.values()), sum(self.sampling.values()))


# ---- the parts


def estimate(cfg: Config) -> Estimate:
    """Return the memory that a run with these flags takes on each process."""
    config = config_of(cfg.model)
    policy = trained(cfg, config, scalar=cfg.method == "reward")
    kept = {
        "weights": policy.weights,
        "adapter": policy.adapter,
        f"optimizer ({cfg.optimizer})": policy.optimizer,
    }
    gradients, activations, working = policy.gradients, policy.activations, policy.working

    # 1. a critic, which is trained after the policy in each micro-batch
    if cfg.method == "ppo" and cfg.advantage == "gae":
        critic = trained(cfg, config_of(cfg.critic or cfg.reward_model or cfg.model), scalar=True)
        kept |= {"critic": critic.weights + critic.adapter, "critic's optimizer": critic.optimizer}
        gradients += critic.gradients
        peak = max(activations + working, critic.activations + critic.working)
        activations = max(activations, critic.activations)
        working = peak - activations

    # 2. models that only score. A teacher scores while the student's activations are there
    for name, weights, passing in scoring_models(cfg, config):
        kept[name] = weights // cfg.processes
        beside = policy.activations if name == "teacher" else 0
        working = max(working, beside + passing - activations)

    update = {"gradients": gradients, "activations": activations, "working": working}
    if policy.gathered:
        update["gathered from other processes"] = policy.gathered
    return Estimate(kept, update, sampling_memory(cfg, config))


def trained(cfg: Config, config: ModelConfig, scalar: bool) -> Memory:
    """Return the memory of a model in training. scalar: a reward model or critic, whose score is trained whole."""
    small = with_layers(config, [*dict.fromkeys(kinds_of(config))])
    training = Training(
        lora=planned_adapter(cfg, small, *(["score"] if scalar else [])),
        base_4bit=cfg.base_4bit,
        tokens=tokens_of(cfg),
        checkpoint_activations=cfg.checkpoint_activations,
        processes=cfg.processes,
        on_gpu=on_gpu(cfg),
        scalar=scalar,
        optimizer_bytes=partial(state_bytes, cfg.optimizer),
    )
    return training_memory(config, training)


def scoring_models(cfg: Config, config: ModelConfig) -> Iterator[tuple[str, int, int]]:
    """Yield (name, bytes of its weights, bytes of a pass) of each model that is not trained.

    A reference beside a fresh adapter is the policy without it, so it takes no memory. Beside whole training it is a
    copy in fp32.
    """
    plan = Training(tokens=tokens_of(cfg), on_gpu=on_gpu(cfg))
    if cfg.method == "ppo" or (cfg.method == "grpo" and cfg.kl_coefficient):
        weights, passing = frozen_memory(config, plan)
        copied = 0 if cfg.lora_rank else weights * 4 // plan.frozen_dtype.itemsize
        yield "reference", copied, passing
    if cfg.reward_model is not None:
        yield "reward model", *frozen_memory(config_of(cfg.reward_model), replace(plan, scalar=True))
    if cfg.teacher is not None:
        yield "teacher", *frozen_memory(config_of(cfg.teacher), plan)


def sampling_memory(cfg: Config, config: ModelConfig) -> dict[str, int]:
    """Return the memory of sampling: the cache of keys and values, within the sampler's budget, and a pass."""
    if cfg.method not in PROMPTS or (cfg.method == "distill" and not cfg.student_samples):
        return {}
    prompts, group = PROMPTS[cfg.method]
    prompts, group = cfg.prompts_per_step or prompts, cfg.group_size or group
    samples = ceil(prompts * group / cfg.processes)
    rows = min(samples, cfg.sampling_batch_size or samples)
    distinct = min(prompts, rows, 2 * ceil(rows / group))
    dtype = torch.bfloat16 if on_gpu(cfg) else torch.float32
    cache = cache_bytes(config, distinct, cfg.max_prompt_length, rows, cfg.max_new_tokens, dtype)

    # prompts are run in portions; a step of all rows has a row of logits for each
    portion = PREFILL_TOKENS["cuda" if on_gpu(cfg) else "cpu"]
    tokens = min(portion, distinct * cfg.max_prompt_length)
    _, passing = frozen_memory(config, Training(tokens=tokens, on_gpu=on_gpu(cfg), base_4bit=cfg.base_4bit))
    logits = 4 * rows * config.vocab_size
    found = {"sampling cache": min(cache, MEMORY_BUDGET), "working while sampling": max(passing, logits)}
    if cfg.processes > 1:  # each process gathers the whole model
        found["gathered while sampling"] = frozen_memory(config, Training(tokens=0, on_gpu=False))[0]
    return found


def tokens_of(cfg: Config) -> int:
    return cfg.micro_batch_tokens or MICRO_BATCH_TOKENS.get(cfg.method, 8192)


def on_gpu(cfg: Config) -> bool:
    return cfg.device.startswith("cuda")


def config_of(folder: Path) -> ModelConfig:
    """Read a model's shape. Raises InputError for an adapter, which has no shape of its own."""
    if is_adapter(folder):
        raise InputError(
            f"{folder}: expected the folder of a whole model, got an adapter: give its base, and --lora-rank"
        )
    file = folder / "config.json"
    if not folder.is_dir():
        raise InputError(
            f"{folder}: no such folder; expected a Hugging Face folder with a config.json{way_to_fetch(folder)}"
        )
    raw = read_object(file)
    is_bnb_4bit(raw, file)  # refuses other formats
    return read_config(raw, str(file))


# ---- the machine


def available(device: str) -> int | None:
    """Return the bytes of the GPU's memory, or of the RAM for cpu. None for a GPU that is not here."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_properties(device).total_memory if torch.cuda.is_available() else None
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def smaller(cfg: Config, room: int) -> tuple[dict[str, Any], int] | None:
    """Return the first flags of SMALLER, added one after another, with which the run fits, and its bytes then."""
    changes: dict[str, Any] = {}
    for change in SMALLER:
        ((name, value),) = change.items()
        now = tokens_of(cfg) if name == "micro_batch_tokens" else getattr(cfg, name)
        is_no_change = bool(now) and (name == "lora_rank" or now is True or (now or 0) <= value)
        if is_no_change or cfg.method not in ONLY_OF.get(name, (cfg.method,)):
            continue
        changes |= change
        total = estimate(replace(cfg, **changes)).total
        if total <= room:
            return changes, total
    return None


def as_flags(changes: dict[str, Any]) -> str:
    names = {f"--{name.replace('_', '-')}": value for name, value in changes.items()}
    return " ".join(flag if value is True else f"{flag} {value}" for flag, value in names.items())


# ---- the command


def main(cfg: Config) -> Estimate:
    """Print the memory of a run, and whether this machine has it. Returns the estimate."""
    _check(cfg)
    found = estimate(cfg)
    print(f"{cfg.method} of {cfg.model}: micro-batches of {tokens_of(cfg):,} tokens, --device {cfg.device}\n")
    _print(found.kept)
    _print(found.update)
    _print(found.sampling)
    if found.sampling:
        larger = "the update" if sum(found.update.values()) > sum(found.sampling.values()) else "sampling"
        print(f"\n  update and sampling take turns: {larger} takes more, and counts in the total")

    # does it fit
    each = " on each process" if cfg.processes > 1 else ""
    print(f"\n  {'total' + each:<32}{found.total / 1e9:10.2f} GB")
    room = available(cfg.device)
    if room is None:
        print("\nThis machine has no GPU: compare the total with the memory of yours.")
        return found
    print(f"  {'this machine has':<32}{room / 1e9:10.2f} GB")
    if found.total > room:
        fitting = smaller(cfg, room)
        if fitting is None:
            way = "no flag of this command makes it fit: take a smaller model, or share it (--processes)"
        else:
            way = f"with {as_flags(fitting[0])} it takes {fitting[1] / 1e9:.2f} GB"
        print(f"\nIt does not fit: {way}.")
    return found


def _print(parts: dict[str, int]) -> None:
    for name, size in parts.items():
        if size:
            print(f"  {name:<32}{size / 1e9:10.2f} GB")


def _check(cfg: Config) -> None:
    """Raise InputError for flags out of bounds, of another method, or that contradict each other."""
    for name, within in bounds(Config).items():
        check_number(name, getattr(cfg, name), within)
    if not re.fullmatch(r"cpu|cuda(:\d{1,3})?", cfg.device):
        raise InputError(f"--device: expected cpu, cuda or cuda:N, got {shown(cfg.device)}")
    defaults = {field.name: field.default for field in fields(Config)}
    for name, methods in ONLY_OF.items():
        if cfg.method not in methods and getattr(cfg, name) != defaults[name]:
            raise InputError(
                f"--{name.replace('_', '-')}: --method {cfg.method} has none: leave the flag out"
            )
    if cfg.critic is not None and cfg.advantage != "gae":
        raise InputError(f"--critic: --advantage {cfg.advantage} has none: leave the flag out")


if __name__ == "__main__":
    sys.exit(run_command("memory", sys.modules[__name__], main, sys.argv[1:]))
