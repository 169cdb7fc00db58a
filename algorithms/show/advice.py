"""The next steps with a trained model, as commands that work when they are pasted."""

import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...model.errors import InputError
from ...model.files.text_files import read_optional


def next_commands(folder: Path, method: str, flags: Mapping[str, Any]) -> list[str]:
    """Return commands for the model that a run has saved, or none before it has.

    flags: those of the run, as in config.json.
    """
    model = folder / "model"
    if not (model / "config.json").is_file() and not (model / "adapter_config.json").is_file():
        return []
    commands = []
    if method == "reward":
        commands += _for_reward_model(model, flags)
    else:
        if _has_chat_template(model):
            commands.append(_command("chat", model=model))
        commands += _evaluation(model, method, flags)
    if (model / "adapter_config.json").is_file():
        commands.append(_command("merge", model=model, output=folder / "merged"))
    return commands


def _for_reward_model(model: Path, flags: Mapping[str, Any]) -> list[str]:
    """Return the evaluation of a reward model on pairs, and PPO with it on the prompts of the training pairs."""
    pairs = _first_file(flags, "eval_data", "held_out", "data")
    ppo = {"model": flags.get("model"), "reward_model": model, "data": _first_file(flags, "data")}
    return [_command("evaluate", model=model, data=pairs), _command("ppo", **ppo)]


def _evaluation(model: Path, method: str, flags: Mapping[str, Any]) -> list[str]:
    """Return the evaluation of a language model on the run's rows, if they are such that evaluate reads."""
    data, rewards = _first_file(flags, "eval_data", "data"), flags.get("reward") or ()
    if data.endswith(".safetensors"):  # lessons
        return []
    if method in ("sft", "distill"):
        return [_command("evaluate", model=model, data=data)]
    if method in ("grpo", "ppo") and rewards:
        return [_command("evaluate", model=model, data=data, reward=rewards)]
    return []


def _command(name: str, **flags: Any) -> str:
    """Return a command line, quoted for a shell. A tuple or list gives a flag several values."""
    words = ["burnish", name]
    for flag, value in flags.items():
        values = value if isinstance(value, list | tuple) else [value]
        words += [f"--{flag.replace('_', '-')}", *(shlex.quote(str(each)) for each in values)]
    return " ".join(words)


def _first_file(flags: Mapping[str, Any], *names: str) -> str:
    """Return the file of the first of these flags that is given, of several files the first."""
    data = next((flags[name] for name in names if flags.get(name)), "")
    return str(data[0] if isinstance(data, list | tuple) else data)


def _has_chat_template(model: Path) -> bool:
    """Return whether `burnish chat` can talk to the model: its folder, or an adapter's base, has a chat template."""
    folders = [model]
    try:
        base = read_optional(model / "adapter_config.json").get("base_model_name_or_path")
        folders += [Path(base)] if isinstance(base, str) else []
        return any(
            os.path.isfile(folder / "chat_template.jinja")
            or "chat_template" in read_optional(folder / "tokenizer_config.json")
            for folder in folders
        )
    except InputError:
        return False
