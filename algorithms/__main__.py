"""The `burnish` command. `burnish COMMAND --help` lists the flags of one command."""

import importlib
import sys

from .run.streams import run_program
from .run.words import did_you_mean, wrapped
from .show.versions import versions

COMMANDS = {  # name: (module, its function that takes a Config, one line of help)
    "r1": (
        "burnish.algorithms.recipes.r1",
        "train",
        "DeepSeek-R1's recipe in miniature, from random weights to a report",
    ),
    "instruct": (
        "burnish.algorithms.recipes.instruct",
        "train",
        "InstructGPT's recipe in miniature: SFT, reward model, PPO, DPO",
    ),
    "sft": (
        "burnish.algorithms.sft",
        "train",
        "supervised fine-tuning on conversations, completions or text",
    ),
    "reward": ("burnish.algorithms.reward", "train", "a reward model from preferences"),
    "dpo": ("burnish.algorithms.dpo", "train", "preference optimization: DPO, IPO, SimPO, ORPO and more"),
    "kto": ("burnish.algorithms.kto", "train", "preference optimization from single judged completions"),
    "ppo": (
        "burnish.algorithms.ppo",
        "train",
        "reinforcement learning with a critic, from a reward model or function",
    ),
    "grpo": ("burnish.algorithms.grpo", "train", "reinforcement learning from your reward function"),
    "distill": (
        "burnish.algorithms.distill",
        "train",
        "train a student on a teacher's distributions, on given rows or on the student's own samples",
    ),
    "teach": (
        "burnish.algorithms.teach",
        "teach",
        "write a teacher's answers and top log-probabilities to a file for distill",
    ),
    "evaluate": (
        "burnish.algorithms.evaluate",
        "evaluate",
        "accuracy, pass@k and majority vote with your verifier; perplexity; a reward model's accuracy",
    ),
    "report": (
        "burnish.algorithms.report",
        "report",
        "write the page of a run, report.html, from the files of its folder",
    ),
    "memory": (
        "burnish.algorithms.memory",
        "main",
        "the memory that a run will take, by purpose, and whether this machine has it",
    ),
    "chat-demo": (
        "burnish.algorithms.recipes.chat_demo",
        "train",
        "GRPO on a real chat model: all weights, LoRA or QLoRA",
    ),
    "bench": (
        "burnish.bench.command",
        "main",
        "time Burnish's ops and your own; its commands: burnish bench --help",
    ),
    "merge": ("burnish.algorithms.merge", "merge", "merge an adapter into its model"),
    "chat": ("burnish.algorithms.chat", "main", "talk to a model"),
    "convert": ("burnish.model.convert", "main", "turn a GGUF file into a Hugging Face folder"),
}


def usage() -> str:
    lines = [f"  {name:<11}{line}" for name, (_, _, line) in COMMANDS.items()]
    end = "burnish COMMAND --help lists the flags of a command. burnish --version names the versions."
    return wrapped("\n".join(["usage: burnish COMMAND [flags]", "", *lines, "", end]))


def main(arguments: list[str] | None = None) -> int:
    """Run one command. Return the exit status: 0, 1 for wrong input, 2 for wrong usage, 130 when interrupted.

    A run that SIGTERM ends raises SystemExit with the status 143.
    """
    if arguments is not None:
        return _status(arguments)
    status = run_program("burnish", lambda: _status(sys.argv[1:]))
    calls = sys.modules.get(f"{__package__}.run.calls")  # imported if users' functions may have run
    return calls.left(status) if calls else status


def _status(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(", ".join(f"{name} {version}" for name, version in versions().items()))
        return 0
    name = arguments[0]
    if name not in COMMANDS:
        print(f"burnish: no command '{name}'{did_you_mean(name, COMMANDS)}\n\n{usage()}", file=sys.stderr)
        return 2
    module_name, function, _ = COMMANDS[name]
    try:
        from .run.command import run_command

        module = importlib.import_module(module_name)
        if not hasattr(module, "Config"):  # the module has subcommands
            return getattr(module, function)(arguments[1:])
        return run_command(f"burnish {name}", module, getattr(module, function), arguments[1:])
    except KeyboardInterrupt:
        print(f"\nburnish {name}: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
