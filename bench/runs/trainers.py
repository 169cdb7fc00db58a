"""Our trainers beside TRL's: whole training runs with the same weights, rows and flags, on one thread.

    burnish bench trainers [sft dpo grpo] [--rounds 5] [--keep]

Each measurement is a process of its own, ours and TRL's in turn (A B A B), so that neither warms the other's memory.
The process is a fork of this one, which has imported both and has run nothing. The model has 4 layers of width 256 and
4,096 words. An epoch is one batch. So each step trains the same rows on both sides, and the losses can be compared step
by step. A step is timed from the end of the step before it. The first two steps are left out. CPU time is that of the
whole run, and does not depend on other work on the machine. Growth is the peak of resident memory beyond the memory of
the process after its imports.

TRL needs transformers, trl and accelerate in the same Python as Burnish. Its defaults are kept with these exceptions:
no activation checkpointing (it is slower, and ours does none either), no shuffling, a constant learning rate, and
AdamW's betas (0.9, 0.95).
"""

import contextlib
import importlib
import io
import json
import multiprocessing
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch

from ...algorithms.run.flags import POSITIONAL, Count
from ...model.errors import InputError
from ..record import machine
from .figures import write_figures

LEFT_OUT = 2  # steps in which allocators and caches warm up
STEPS, LEARNING_RATE = 5, 1e-3
TRAINERS = {"sft": "SFT", "dpo": "DPO", "grpo": "GRPO"}  # TRL's names
ROWS = {"sft": 16, "dpo": 8, "grpo": 4}  # rows of one step
VOCABULARY, GROUP_SIZE, NEW_TOKENS = 4096, 8, 64
SHAPE = {
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 1,
}


@dataclass(frozen=True, kw_only=True)
class Config:
    tasks: Annotated[tuple[str, ...], POSITIONAL] = ()  # sft, dpo, grpo (default: all)
    rounds: Count = 5  # rounds, each with both sides in turn
    json: Path | None = None  # write the figures to this file
    keep: bool = False  # keep the figures in bench/results, under their usual name


# ---- the model and the rows


def write_model(folder: Path, **changes: Any) -> None:
    """Write a random model of SHAPE, with the given changes, and a tokenizer of words."""
    from tokenizers import Tokenizer as WordTokenizer
    from tokenizers import models, pre_tokenizers

    from ...model.checkpoint import save_model
    from ...model.files.config_json import read_config
    from ...model.text.tokenizer import Tokenizer
    from ...model.transformer import Transformer

    words = {"<eos>": 0, "<pad>": 1} | {f"w{i}": i for i in range(2, VOCABULARY)}
    tokenizer = WordTokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<eos>", "<pad>"])
    config = read_config(SHAPE | changes, "trainers")
    save_model(Transformer(config, seed=0), folder, Tokenizer(tokenizer, eos="<eos>"))


def write_rows(file: Path, task: str) -> None:
    """Write rows with a prompt of 32 to 64 words and, for SFT and DPO, answers of 32 to 192 words."""
    draw = random.Random(0)

    def words(least: int, most: int) -> str:
        return " ".join(f"w{draw.randrange(2, VOCABULARY)}" for _ in range(draw.randint(least, most)))

    rows = []
    for _ in range(ROWS[task]):
        row = {"prompt": words(32, 64)}
        # an answer begins with a blank, so that both sides tokenise prompt and answer separately to the same ids
        for column in {"sft": ("completion",), "dpo": ("chosen", "rejected"), "grpo": ()}[task]:
            row[column] = " " + words(32, 192)
        rows.append(row)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def even_words(completion_ids: list[list[int]], **_: object) -> list[float]:
    """Return the share of even ids in each completion, a reward that is cheap to compute."""
    return [sum(i % 2 == 0 for i in ids) / max(1, len(ids)) for ids in completion_ids]


# ---- one process: train, and measure


def train_burnish(task: str, folder: Path) -> Callable[[], list[dict[str, float]]]:
    module = importlib.import_module(f"burnish.algorithms.{task}")
    common = {
        "model": folder / "model",
        "data": folder / f"{task}.jsonl",
        "output": Path(tempfile.mkdtemp(dir=folder)) / "run",
        "steps": STEPS,
        "learning_rate": LEARNING_RATE,
        "schedule": "constant",
        "warmup_steps": 0,
        "device": "cpu",
    }

    own = {
        "sft": {"batch_size": ROWS["sft"]},
        "dpo": {"batch_size": ROWS["dpo"]},
        "grpo": {
            "reward": ("burnish.bench.runs.trainers:even_words",),
            "prompts_per_step": ROWS["grpo"],
            "group_size": GROUP_SIZE,
            "max_new_tokens": NEW_TOKENS,
        },
    }[task]
    cfg = module.Config(**common, **own)

    def run() -> list[dict[str, float]]:
        module.train(cfg)
        return [json.loads(line) for line in (cfg.output / "metrics.jsonl").read_text().splitlines()]

    return run


def train_trl(task: str, folder: Path) -> Callable[[], list[dict[str, float]]]:
    datasets, transformers, trl = map(importlib.import_module, ("datasets", "transformers", "trl"))
    transformers.logging.set_verbosity_error()
    name = TRAINERS[task]
    Trainer = getattr(trl, f"{name}Trainer")  # imported upon first use: here, before the clock starts
    Tokenizer, Model = transformers.PreTrainedTokenizerFast, transformers.LlamaForCausalLM

    rows = [json.loads(line) for line in (folder / f"{task}.jsonl").read_text().splitlines()]
    flags = trl_flags(task, len(rows)) | {"output_dir": tempfile.mkdtemp(dir=folder)}
    arguments = getattr(trl, f"{name}Config")(**flags)
    record = trl_record(transformers.TrainerCallback)

    def run() -> list[dict[str, float]]:
        file = folder / "model" / "tokenizer.json"
        tokenizer = Tokenizer(tokenizer_file=str(file), eos_token="<eos>", pad_token="<pad>")
        model = Model.from_pretrained(folder / "model", dtype=torch.float32)
        extra = {"reward_funcs": even_words} if task == "grpo" else {}
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=tokenizer,
            callbacks=[record],
            **extra,
        )

        trainer.train()
        return record.steps

    return run


def trl_flags(task: str, rows: int) -> dict[str, Any]:
    """Return TRL's arguments for a run in which each step trains all rows at once."""
    own = {
        "sft": {"completion_only_loss": True},
        "dpo": {},
        "grpo": {"num_generations": GROUP_SIZE, "max_completion_length": NEW_TOKENS},
    }[task]

    return own | {
        "max_steps": STEPS,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "adam_beta2": 0.95,
        "max_grad_norm": 1.0,
        "gradient_checkpointing": False,
        "per_device_train_batch_size": rows * (GROUP_SIZE if task == "grpo" else 1),
        "use_cpu": True,
        "bf16": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }


def trl_record(callback: Any) -> Any:
    """Return a transformers callback whose `steps` hold the loss, the seconds and the length of each step."""

    class Record(callback):
        def __init__(self) -> None:
            self.steps: list[dict[str, float]] = []
            self.clock = 0.0

        def on_train_begin(self, *_: object, **__: object) -> None:
            self.clock = time.perf_counter()

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: object) -> None:
            if "loss" in logs:
                now = time.perf_counter()
                length = logs.get("completions/mean_length", 0.0)
                self.steps.append({"loss": logs["loss"], "length": length, "seconds": now - self.clock})
                self.clock = now

    return Record()


def import_both() -> None:
    """Import both libraries in this process, so that no fork has to import them."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    transformers, trl, _ = map(importlib.import_module, ("transformers", "trl", "datasets"))
    _ = transformers.PreTrainedTokenizerFast, transformers.LlamaForCausalLM
    for task, name in TRAINERS.items():
        importlib.import_module(f"burnish.algorithms.{task}")
        _ = getattr(trl, f"{name}Trainer"), getattr(trl, f"{name}Config")


def resident(name: str) -> int:
    """Return VmRSS (resident memory) or VmHWM (its peak) of this process in bytes. Source: proc(5)."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


def worker(side: str, task: str, folder: Path) -> dict[str, Any]:
    """Train once with "burnish" or "trl". Return tokens per second, memory growth and losses."""
    run = {"burnish": train_burnish, "trl": train_trl}[side](task, folder)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before, started = resident("VmRSS"), time.process_time()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        steps = run()
    seconds = time.process_time() - started

    if task == "grpo":
        tokens = [step["length"] * ROWS["grpo"] * GROUP_SIZE for step in steps]
    else:
        tokens = [float(count_tokens(task, folder))] * len(steps)
    speeds = [n / step["seconds"] for n, step in zip(tokens, steps, strict=True)]
    return {
        "tokens_per_second": median(speeds[LEFT_OUT:]),
        "tokens_per_cpu_second": sum(tokens) / seconds,
        "growth_bytes": resident("VmHWM") - before,
        "losses": [step["loss"] for step in steps],
    }


def forked(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a fork of this process, and return its result. Raises SystemExit if the fork fails."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=lambda: sender.send(function(*arguments)))
    child.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        raise SystemExit(f"{function.__name__}{arguments} failed, see the error above") from None
    finally:
        child.join()


def count_tokens(task: str, folder: Path) -> int:
    """Return the number of tokens of one step of SFT or DPO: prompts, answers, and an end token after each answer."""
    rows = [json.loads(line) for line in (folder / f"{task}.jsonl").read_text().splitlines()]
    if task == "sft":
        return sum(len((row["prompt"] + row["completion"]).split()) + 1 for row in rows)
    pairs = [row["prompt"] + row[column] for row in rows for column in ("chosen", "rejected")]
    return sum(len(pair.split()) + 1 for pair in pairs)


# ---- the comparison


def import_seconds(side: str, task: str) -> float:
    """Return the CPU seconds in which a new process imports a trainer of "burnish" or "trl", torch included."""
    theirs = f"from trl import {TRAINERS[task]}Trainer"
    code = f"import burnish.algorithms.{task}" if side == "burnish" else theirs
    before = os.times()
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def measure(task: str, rounds: int) -> dict[str, Any]:
    """Run both sides in turn. Return medians over the rounds and, except for GRPO, how far the two losses differ."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder / "model")
        write_rows(folder / f"{task}.jsonl", task)
        runs: dict[str, list[dict[str, Any]]] = {"burnish": [], "trl": []}
        for index in range(rounds):
            for side, results in runs.items():
                results.append(forked(worker, side, task, folder))
                speed = results[-1]["tokens_per_second"]
                print(f"{task} round {index + 1}: {side:<8} {speed:9,.0f} tokens/s", flush=True)

    row: dict[str, Any] = {"task": task, "steps": STEPS, "rounds": rounds}
    for side, results in runs.items():
        row[side] = {
            key: median(result[key] for result in results)
            for key in ("tokens_per_second", "tokens_per_cpu_second", "growth_bytes")
        }
        row[side]["import_seconds"] = import_seconds(side, task)

    for ratio, key in (("speed", "tokens_per_second"), ("cpu", "tokens_per_cpu_second")):
        pairs = zip(runs["burnish"], runs["trl"], strict=True)
        ratios = [ours[key] / theirs[key] for ours, theirs in pairs]
        row[f"{ratio}_ratio"], row[f"{ratio}_ratios"] = median(ratios), ratios
    row["growth_ratio"] = row["burnish"]["growth_bytes"] / row["trl"]["growth_bytes"]
    if task != "grpo":  # each side of GRPO draws its own samples
        pairs = zip(runs["burnish"][0]["losses"], runs["trl"][0]["losses"], strict=True)
        row["loss_difference"] = max(abs(ours - theirs) for ours, theirs in pairs)
    return row


def summary(row: dict[str, Any]) -> str:
    """Return a line of text with the figures of a task."""
    ours, theirs = row["burnish"], row["trl"]
    differ = f", losses differ by {row['loss_difference']:.1e}" if "loss_difference" in row else ""
    return (
        f"{row['task']:<5} {row['speed_ratio']:.2f}x TRL's tokens/s "
        f"({ours['tokens_per_second']:,.0f} beside {theirs['tokens_per_second']:,.0f}), "
        f"{row['cpu_ratio']:.2f}x by CPU time, "
        f"{row['growth_ratio']:.2f}x its memory growth "
        f"({ours['growth_bytes'] / 1e6:.0f} beside {theirs['growth_bytes'] / 1e6:.0f} MB), "
        f"imports {ours['import_seconds']:.1f} beside {theirs['import_seconds']:.1f} s{differ}"
    )


def main(cfg: Config) -> int:
    for task in cfg.tasks:
        if task not in TRAINERS:
            raise InputError(f"expected trainers among {', '.join(TRAINERS)}, got {task!r}")

    torch.set_num_threads(1)
    import_both()
    rows = [measure(task, cfg.rounds) for task in cfg.tasks or TRAINERS]
    for row in rows:
        print(summary(row))

    packages = ("torch", "transformers", "trl", "accelerate")
    facts = machine("cpu") | {name: version(name) for name in packages}
    write_figures("trainers", cfg, machine=facts, rows=rows)
    return 0
