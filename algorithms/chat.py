"""Talk to a model, turn by turn: what you type, rendered by its chat template, and what it goes on to write.

Ctrl-C stops an answer, and at the prompt it ends the conversation, as Ctrl-D does. A model without a chat template goes
on with your text as it is; --chat-template plain has it converse all the same.

Run:    burnish chat --model DIR
        burnish chat --model DIR --prompt "What is the capital of France?" --temperature 0
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..model.errors import InputError, shown
from ..model.files.text_files import read_json
from ..model.generate import stream
from ..model.text.tokenizer import Message, Tokenizer
from ..model.transformer import Transformer
from .data.examples import check_rendered
from .data.messages import messages_in, prompt_of
from .data.row import Row
from .data.tokenizer import load_tokenizer
from .run.command import run_command
from .run.flags import DeviceFlags, TemplateFlags, check_device
from .run.ids import check_sequence
from .run.streams import harmless, is_lost
from .run.trainee import load_frozen


@dataclass(frozen=True, kw_only=True)
class Config(DeviceFlags, TemplateFlags):
    model: Path  # Hugging Face folder, or an adapter's
    tools: Path | None = None  # a JSON file with the list of tools that the chat template describes
    prompt: str | None = None  # answer this and end, instead of reading prompts
    system: str | None = None  # system message, where the model has a chat template
    max_new_tokens: int = 512  # of one answer
    temperature: float = 0.2  # 0 takes the most likely token
    top_p: float = 0.9  # sample from the fewest tokens that have this probability together
    seed: int = 0  # of sampling


def answer(cfg: Config, model: Transformer, tokenizer: Tokenizer, prompt: list[int], seed: int) -> str:
    """Write the answer to standard output as it comes, and return it. Ctrl-C ends it early, unless --prompt asked."""
    tokens = stream(
        model,
        prompt,
        max_new_tokens=cfg.max_new_tokens,
        temperature=cfg.temperature,
        top_p=cfg.top_p,
        vocabulary=tokenizer.vocabulary,
        stop_ids=tokenizer.stop_ids,
        seed=seed,
    )

    ids: list[int] = []
    printed, visible = "", harmless if sys.stdout.isatty() else str
    try:
        for token in tokens:
            ids.append(token)
            text = tokenizer.decode(ids)
            if not text.endswith("\ufffd"):  # a character whose last bytes are still to come
                print(visible(text[len(printed) :]), end="", flush=True)
                printed = text
    except KeyboardInterrupt:
        if cfg.prompt is not None:
            raise

    text = tokenizer.decode(ids)
    print(visible(text[len(printed) :]), flush=True)
    return text


def _checked_opening(cfg: Config, tokenizer: Tokenizer, opening: list[Message]) -> dict[str, Any]:
    """The variables that the chat template is given beside messages. Raises InputError where it leaves out a flag."""
    flag = "system" if opening else "tools" if cfg.tools else "chat-template-kwargs"
    if (opening or cfg.tools) and tokenizer.chat_template is None:
        raise InputError(
            f"--{flag}: the model has no chat template that could place it; name one with --chat-template"
        )

    if cfg.tools is None:
        row = Row({}, f"--{flag}")
    elif "tools" not in tokenizer.template_variables:
        raise InputError("--tools: the chat template reads none")
    else:
        row = Row({"tools": _read_tools(cfg.tools)}, f"--tools {cfg.tools}")

    if not opening and cfg.tools is None and not tokenizer.variables:
        return {}
    try:
        turns = messages_in([*opening, {"role": "user", "content": "Hello"}], "messages")
        variables = prompt_of(row, turns, tokenizer).variables
    except InputError as error:
        raise InputError(f"--{flag}: {error}") from error
    check_rendered([row], tokenizer)
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
    """The next line that is typed, None at the end. Raises InputError where standard input cannot be read."""
    if sys.stdin is None:
        raise InputError("standard input is closed: ask by --prompt TEXT")
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
    """Converse until the prompts end, or answer --prompt alone."""
    # 1. a model, and what its chat template is given
    _check_flags(cfg)
    tokenizer = load_tokenizer(cfg)
    model = load_frozen(cfg.model, cfg.device)
    opening = [] if cfg.system is None else [{"role": "system", "content": cfg.system}]
    variables = _checked_opening(cfg, tokenizer, opening)
    converses = tokenizer.chat_template is not None

    # 2. a greeting, where somebody types
    at_terminal = cfg.prompt is None and sys.stdin is not None and sys.stdin.isatty()
    if at_terminal:
        new = "/new starts a new conversation"
        hint = new if converses else "it has no chat template: it goes on with your text"
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
    """Remark upon a prompt whose answer may end beyond what the model was trained for. Raises InputError for an id
    that it has no row for.
    """
    if len(prompt) + cfg.max_new_tokens > (limit := model.config.max_position_embeddings):
        print(
            f"(beyond the {limit} tokens that the model was trained for; /new starts anew)",
            file=sys.stderr,
        )
    check_sequence("what was said", prompt, tokenizer, model.config.vocab_size, str(cfg.model))


if __name__ == "__main__":
    sys.exit(run_command("chat", sys.modules[__name__], main, sys.argv[1:]))
