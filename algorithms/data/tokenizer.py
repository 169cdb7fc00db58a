"""Loading of a run's tokenizer, with the chat template that its flags give."""

from pathlib import Path
from typing import Any

from ...model.errors import InputError
from ...model.text.template import OWN_NAMES
from ...model.text.tokenizer import Tokenizer
from .messages import check_names, from_json
from .rendering import changes_text


def load_tokenizer(cfg: Any) -> Tokenizer:
    """Load the tokenizer of --model, and apply --chat-template and --chat-template-kwargs.

    Raises InputError if a variable of --chat-template-kwargs is not read by the template.
    """
    flag, tokenizer = "--chat-template-kwargs", Tokenizer.load(cfg.model, cfg.chat_template)
    variables = from_json(cfg.chat_template_kwargs, flag)
    if variables is None:
        return tokenizer
    if not isinstance(variables, dict):
        raise InputError(f"{flag}: expected a JSON object, got {variables!r:.60}")
    if tokenizer.chat_template is None:
        raise InputError(f"{flag}: the model has no chat template: name one with --chat-template")

    # check that the template reads the variables
    check_names(variables, flag)
    if unread := sorted(variables.keys() - tokenizer.template_variables):
        probe = [{"role": "user", "content": "Hello"}]
        names = sorted(tokenizer.template_variables - OWN_NAMES)
        known = ", ".join(name for name in names if changes_text(name, probe, tokenizer, {})) or "none"
        raise InputError(f"{flag}: the chat template reads no variable '{unread[0]:.60}'; it reads {known}")
    tokenizer.variables = variables
    return tokenizer


def check_tokenizer(folder: Path, tokenizer: Tokenizer, flag: str) -> None:
    """Raise InputError if the tokenizer of a second model differs from that of --model.

    folder: the second model. flag: the flag that names it.
    """
    if Tokenizer.load(folder).backend.get_vocab() != tokenizer.backend.get_vocab():
        raise InputError(
            f"--{flag} {folder}: expected the tokenizer of --model, got another: its ids mean other tokens"
        )
