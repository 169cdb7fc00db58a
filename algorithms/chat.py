"""Talk to a model, turn by turn.

The chat template renders each line that you type, and the model's answer is printed as it is sampled. Ctrl-C stops an
answer. At the prompt, Ctrl-C or Ctrl-D ends the conversation. A model without a chat template continues your text as it
stands. With --chat-template plain such a model can hold a conversation, too.

Run:    burnish chat --model DIR
        burnish chat --model DIR --prompt "What is the capital of France?" --temperature 0
"""

import sys
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
from .run.streams import harmless, is_lost
from .run.trainee import load_frozen


@dataclass(frozen=True, kw_only=True)
class Config(DeviceFlags, TemplateFlags):
    model: Path  # Hugging Face folder, or an adapter's folder
    tools: Path | None = None  # JSON file with a list of tools, for the chat template
    prompt: str | None = None  # answer this prompt and exit, instead of reading prompts
    system: str | None = None  # system message; requires a chat template
    max_new_tokens: int = 512  # maximum number of tokens in one answer
    temperature: float = 0.2  # temperature of sampling; 0 always takes the most likely token
    top_p: float = 0.9  # sample from the fewest tokens whose probabilities sum to this
    seed: int = 0  # seed of sampling


def answer(cfg: Config, model: Transformer, tokenizer: Tokenizer, prompt: list[int], seed: int) -> str:
    """Print the answer while it is sampled, and return it. Ctrl-C stops the answer, or the command with --prompt."""
    tokens = stream(
        model,
        prompt,
        SamplingParams(
            max_new_tokens=cfg.max_new_tokens,
            temperature=cfg.temperature,
            top_p=cfg.top_p,
            vocabulary=tokenizer.vocabulary,
            stop_ids=tokenizer.stop_ids,
            seed=seed,
        ),
    )

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
    _check_flags(cfg)
    tokenizer = load_tokenizer(cfg)
    model = load_frozen(cfg.model, cfg.device)
    opening = [] if cfg.system is None else [{"role": "system", "content": cfg.system}]
    variables = _checked_opening(cfg, tokenizer, opening)
    converses = tokenizer.chat_template is not None

    # 2. a greeting, if someone is typing
    at_terminal = cfg.prompt is None and sys.stdin is not None and sys.stdin.isatty()
    if at_terminal:
        new = "/new starts a new conversation"
        hint = new if converses else "no chat template: the model continues your text"
        print(f"{cfg.model}: {hint}; Ctrl-D ends")

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


def _check_flags(cfg: Config) -> None:
    for flag, value, is_right, expected in (
        ("max-new-tokens", cfg.max_new_tokens, cfg.max_new_tokens >= 1, "at least 1"),
        ("temperature", cfg.temperature, cfg.temperature >= 0, "at least 0"),
        ("top-p", cfg.top_p, 0 < cfg.top_p <= 1, "more than 0 and at most 1"),
    ):
        if not is_right:
            raise InputError(f"--{flag}: expected {expected}, got {value}")
    check_device(cfg.device)


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
