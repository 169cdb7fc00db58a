"""Talk to a model, turn by turn.

The chat template renders each line that you type, and the model's answer is printed as it is sampled. Ctrl-C stops an
answer. At the prompt, Ctrl-C or Ctrl-D ends the conversation. A model without a chat template continues your text as it
stands. With --chat-template plain such a model can hold a conversation, too.

If do_sample is true in the model's generation_config.json, its temperature, top_p, top_k and min_p count. Otherwise an
answer is greedy: each token is the most likely one, and the same prompt gets the same answer. Flags override both.

Run:    burnish chat --model DIR
        burnish chat --model DIR --prompt "What is the capital of France?" --temperature 0
"""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..model.errors import InputError, shown
from ..model.files.text_files import read_json
from ..model.generate import SamplingParams, stream
from ..model.text.tokenizer import Message, Tokenizer
from ..model.transformer import Transformer
from .data.messages import messages_in, prompt_of
from .data.row import Row
from .data.rows import Tally, check_rendered
from .data.tokenizer import load_tokenizer
from .run.checks import check_device
from .run.command import run_command
from .run.flags import DeviceFlags, TemplateFlags
from .run.ids import check_sequence
from .run.streams import is_lost
from .run.trainee import load_frozen
from .show.text import harmless

RANGES: dict[str, tuple[Callable[[float], bool], str]] = {  # name: what is in range, and words for it
    "temperature": (lambda x: 0 <= x <= 1e3, "at least 0 and at most 1000"),
    "top_p": (lambda x: 0 < x <= 1, "more than 0 and at most 1"),
    "top_k": (lambda x: x >= 0 and x == int(x), "a whole number of at least 0"),
    "min_p": (lambda x: 0 <= x <= 1, "at least 0 and at most 1"),
}


@dataclass(frozen=True, kw_only=True)
class Config(DeviceFlags, TemplateFlags):
    model: Path  # Hugging Face folder, or an adapter's folder
    tools: Path | None = None  # JSON file with a list of tools, for the chat template
    prompt: str | None = None  # answer this prompt and exit, instead of reading prompts
    system: str | None = None  # system message; requires a chat template
    max_new_tokens: int = 512  # maximum number of tokens in one answer
    temperature: float | None = None  # 0: always the most likely token (default: as the model's config says)
    top_p: float | None = (
        None  # of the fewest tokens with this total probability (default: as for temperature)
    )
    top_k: int | None = None  # of the k most likely tokens; 0: of all (default: as for temperature)
    seed: int = 0  # seed of sampling


def answer(cfg: Config, model: Transformer, tokenizer: Tokenizer, prompt: list[int], seed: int) -> str:
    """Print the answer while it is sampled, and return it. Ctrl-C stops the answer, or the command with --prompt."""
    rule = rule_of(cfg, model.config.generation)
    params = SamplingParams(
        max_new_tokens=cfg.max_new_tokens,
        vocabulary=tokenizer.vocabulary,
        stop_ids=tokenizer.stop_ids,
        seed=seed,
        **rule,
    )
    tokens = stream(model, prompt, params)

    ids: list[int] = []
    printed, visible = "", harmless if sys.stdout.isatty() else str
    try:
        for token in tokens:
            ids.append(token)
            text = tokenizer.decode(ids)
            if not text.endswith("\ufffd"):  # U+FFFD: the last character is incomplete
                print(visible(text[len(printed) :]), end="", flush=True)
                printed = text
    except KeyboardInterrupt:
        if cfg.prompt is not None:
            raise

    text = tokenizer.decode(ids)
    print(visible(text[len(printed) :]), flush=True)
    return text


def rule_of(cfg: Config, generation: Mapping[str, Any]) -> dict[str, Any]:
    """Return temperature, and top_p, top_k and min_p where they are set: those of the flags, or else of the model.

    generation: the model's generation_config.json. Its values count if do_sample is true. Without them and without
    flags, the temperature is 0. Raises InputError for a value out of range, and for a flag without effect.
    """
    flags = {name: getattr(cfg, name) for name in ("temperature", "top_p", "top_k")}
    flags = {name: value for name, value in flags.items() if value is not None}
    if flags.get("temperature") == 0:
        for name in flags.keys() - {"temperature"}:
            raise InputError(
                f"--{name.replace('_', '-')}: expected --temperature above 0 beside it, got 0, which samples nothing"
            )
        return {"temperature": 0.0}

    samples = generation.get("do_sample") is True
    of_model = {name: generation.get(name) for name in RANGES} if samples else {}
    of_model = {name: value for name, value in of_model.items() if value is not None}
    if not samples and not flags:
        return {"temperature": 0.0}

    # the rule, from the model and from the flags over it
    for name, value in [*flags.items(), *of_model.items()]:
        fits, expected = RANGES[name]
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not fits(value):
            flag = f"--{name.replace('_', '-')}"
            where = flag if value is flags.get(name) else f"generation_config.json: {name}"
            raise InputError(f"{where}: expected {expected}, got {shown(value)}")
    rule = {"temperature": 1.0} | of_model | flags
    top_k = int(rule.pop("top_k", 0))
    return rule | ({"top_k": top_k} if top_k else {})


def described(rule: Mapping[str, Any]) -> str:
    """Return the words for a rule of sampling, as rule_of gives it."""
    if rule["temperature"] == 0:
        return "greedy: the most likely token each time"
    return "samples at " + ", ".join(f"{name} {value:g}" for name, value in rule.items())


def _checked_opening(cfg: Config, tokenizer: Tokenizer, opening: list[Message]) -> dict[str, Any]:
    """Return the variables that the chat template receives besides the messages.

    Raises InputError if the template cannot use --system, --tools or --chat-template-kwargs.
    """
    flag = "system" if opening else "tools" if cfg.tools else "chat-template-kwargs"
    if (opening or cfg.tools) and tokenizer.chat_template is None:
        raise InputError(f"--{flag}: the model has no chat template; name one with --chat-template")

    if cfg.tools is None:
        row = Row({}, f"--{flag}")
    elif "tools" not in tokenizer.template_variables:
        raise InputError("--tools: the chat template does not use tools")
    else:
        row = Row({"tools": _read_tools(cfg.tools)}, f"--tools {cfg.tools}")

    if not opening and cfg.tools is None and not tokenizer.variables:
        return {}
    try:
        turns = messages_in([*opening, {"role": "user", "content": "Hello"}], "messages")
        variables = prompt_of(row, turns, tokenizer).variables
    except InputError as error:
        raise InputError(f"--{flag}: {error}") from error
    counts = Tally()
    counts.close([row])
    check_rendered([counts], tokenizer)
    return variables


def _read_tools(file: Path) -> list[dict[str, Any]]:
    try:
        tools = read_json(file)
    except InputError as error:
        raise InputError(f"--tools {error}") from None
    if not isinstance(tools, list) or not tools or not all(isinstance(tool, dict) for tool in tools):
        raise InputError(f"--tools {file}: expected a list of tools, each an object, got {shown(tools)}")
    return tools


def _next_prompt(at_terminal: bool) -> str | None:
    """Return the next line typed, or None at the end. Raises InputError if standard input cannot be read."""
    if sys.stdin is None:
        raise InputError("standard input is closed: give the prompt with --prompt TEXT")
    try:
        return input("\n> " if at_terminal else "")
    except (EOFError, KeyboardInterrupt):
        print()
        return None
    except UnicodeDecodeError as error:
        raise InputError(f"standard input: not UTF-8 text: {error}") from None
    except OSError as error:
        raise InputError(f"standard input: cannot be read: {error.strerror}") from None


def main(cfg: Config) -> None:
    """Answer prompts from standard input until the input ends, or answer only --prompt."""
    # 1. the model, and the variables of its chat template
    if cfg.max_new_tokens < 1:
        raise InputError(f"--max-new-tokens: expected at least 1, got {cfg.max_new_tokens}")
    check_device(cfg.device)
    rule_of(cfg, {})
    tokenizer = load_tokenizer(cfg)
    model = load_frozen(cfg.model, cfg.device)
    opening = [] if cfg.system is None else [{"role": "system", "content": cfg.system}]
    variables = _checked_opening(cfg, tokenizer, opening)
    converses = tokenizer.chat_template is not None
    rule = rule_of(cfg, model.config.generation)

    # 2. a greeting, if someone is typing
    at_terminal = cfg.prompt is None and sys.stdin is not None and sys.stdin.isatty()
    if at_terminal:
        new = "/new starts a new conversation"
        hint = new if converses else "no chat template: the model continues your text"
        print(f"{cfg.model}: {described(rule)}; {hint}; Ctrl-D ends")

    # 3. turn by turn
    messages, num_answers = list(opening), 0
    while (text := _next_prompt(at_terminal) if cfg.prompt is None else cfg.prompt) is not None:
        if text.strip() == "/new":
            messages = list(opening)
        elif text.strip():
            messages.append({"role": "user", "content": text})
            prompt = (
                tokenizer.encode_chat(messages, add_generation_prompt=True, **variables)
                if converses
                else tokenizer.encode_text(text)
            )
            _check_prompt(cfg, model, tokenizer, prompt)
            reply = answer(cfg, model, tokenizer, prompt, cfg.seed + num_answers)
            num_answers += 1
            messages.append({"role": "assistant", "content": reply.strip()})

        if cfg.prompt is not None or is_lost(sys.stdout):
            return


def _check_prompt(cfg: Config, model: Transformer, tokenizer: Tokenizer, prompt: list[int]) -> None:
    """Print a note if the answer may end beyond the length that the model was trained for.

    Raises InputError for a token id that has no row in the model's embedding.
    """
    if len(prompt) + cfg.max_new_tokens > (limit := model.config.max_position_embeddings):
        print(
            f"(beyond the {limit} tokens that the model was trained for; /new starts a new conversation)",
            file=sys.stderr,
        )
    check_sequence("what was said", prompt, tokenizer, model.config.vocab_size, str(cfg.model))


if __name__ == "__main__":
    sys.exit(run_command("chat", sys.modules[__name__], main, sys.argv[1:]))
