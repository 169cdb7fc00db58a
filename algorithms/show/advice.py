"""The next steps with a trained model, as commands that work when they are pasted."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# flags of a run that the next command needs, to read the same rows in the same way
OF_ROWS = ("row_template", "chat_template_kwargs")  # the model's folder has the chat template of the run
OF_PROMPTS = ("prompt_column", "max_prompt_length", "max_new_tokens")
DEFAULTS = {  # of burnish evaluate
    "max_length": 1024,
    "max_prompt_length": 1024,
    "max_new_tokens": 256,
    "train_on": "completion",
}


def next_commands(folder: Path, method: str, flags: Mapping[str, Any]) -> list[str]:
    """Return commands for the model that a run has saved, or none before it has.

    With --keep-best they are for the best model. A flag that says how the run read its rows comes along.
    flags: those of the run, as in config.json.
    """
    model = folder / "model"
    if not _is_model(model):
        return []
    best = folder / "best"
    if flags.get("keep_best") and _is_model(best):
        model = best
    commands = []
    if method == "reward":
        commands += _for_reward_model(model, flags)
    elif method:
        commands += [_chat(model, flags), *_evaluation(model, method, flags)]
    if (model / "adapter_config.json").is_file():
        commands.append(_command("merge", model=model, output=folder / "merged"))
    return commands


def _chat(model: Path, flags: Mapping[str, Any]) -> str:
    """Return the command to talk to a model, also one without a chat template, which continues a text."""
    return _command("chat", model=model, **_given(flags, "chat_template_kwargs"))


def _for_reward_model(model: Path, flags: Mapping[str, Any]) -> list[str]:
    """Return the evaluation of a reward model on pairs, and PPO with it on the prompts of the training pairs."""
    pairs = _files(flags, "eval_data", "held_out", "data")
    ppo = {"model": flags.get("model"), "reward_model": model, "data": _files(flags, "data")}
    return [
        _command("evaluate", model=model, data=pairs, **_given(flags, *OF_ROWS, "max_length")),
        _command("ppo", **ppo, **_given(flags, "chat_template", *OF_ROWS)),
    ]


def _evaluation(model: Path, method: str, flags: Mapping[str, Any]) -> list[str]:
    """Return the evaluation of a language model on the run's rows, if they are such that evaluate reads."""
    data, rewards = _files(flags, "eval_data", "data"), flags.get("reward") or ()
    if any(file.endswith(".safetensors") for file in data):  # lessons
        return []
    if method in ("sft", "distill"):
        given = _given(flags, *OF_ROWS, "max_length", "train_on")
        return [_command("evaluate", model=model, data=data, **given)]
    if method in ("grpo", "ppo") and rewards:
        given = _given(flags, *OF_ROWS, *OF_PROMPTS)
        return [_command("evaluate", model=model, data=data, reward=rewards, **given)]
    return []


def _given(flags: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """Return the flags among `names` that the run had off the default of `burnish evaluate`."""
    return {name: flags[name] for name in names if flags.get(name) not in (None, DEFAULTS.get(name))}


def _command(name: str, **flags: Any) -> str:
    """Return a command line, quoted for a shell. A tuple or list gives a flag several values."""
    words = ["burnish", name]
    for flag, value in flags.items():
        values = value if isinstance(value, list | tuple) else [value]
        words += [f"--{flag.replace('_', '-')}", *(shlex.quote(str(each)) for each in values)]
    return " ".join(words)


def _files(flags: Mapping[str, Any], *names: str) -> list[str]:
    """Return the files of the first of these flags that is given."""
    data = next((flags[name] for name in names if flags.get(name)), "")
    return [str(file) for file in (data if isinstance(data, list | tuple) else [data])]


def _is_model(folder: Path) -> bool:
    return (folder / "config.json").is_file() or (folder / "adapter_config.json").is_file()
