"""Flags of every command that reads rows, renders conversations or trains, and the tokenizer that they make."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ...model.errors import InputError
from ...model.text.template import OWN_NAMES
from ...model.text.tokenizer import Tokenizer
from ..data.messages import check_names, from_json
from ..data.rendering import changes_text


@dataclass(frozen=True, kw_only=True)
class TemplateFlags:
    chat_template: str | None = None  # a jinja file, or plain, in place of the model's own
    chat_template_kwargs: str | None = None  # JSON object of its variables: '{"enable_thinking": false}'


@dataclass(frozen=True, kw_only=True)
class RowFlags(TemplateFlags):
    row_template: Path | None = None  # a jinja file that makes prompt and completion, or messages, of a row


@dataclass(frozen=True, kw_only=True)
class TrainingFlags(RowFlags):
    router_aux_loss_coef: float | None = None  # weight of the experts' balance loss; config.json's by default
    balance: Literal["pooled", "layer"] = "pooled"  # over all layers at once, or the mean of each layer's own


def load_tokenizer(cfg: Any) -> Tokenizer:
    """The tokenizer of --model, with what --chat-template and --chat-template-kwargs say."""
    flag, tokenizer = "--chat-template-kwargs", Tokenizer.load(cfg.model, cfg.chat_template)
    variables = from_json(cfg.chat_template_kwargs, flag)
    if variables is None:
        return tokenizer
    if not isinstance(variables, dict):
        raise InputError(f"{flag}: expected a JSON object, got {variables!r:.60}")
    if tokenizer.chat_template is None:
        raise InputError(f"{flag}: the model has no chat template to read it: name one (--chat-template)")
    check_names(variables, flag)
    if unread := sorted(variables.keys() - tokenizer.template_variables):
        asked = [{"role": "user", "content": "Hello"}]
        names = sorted(tokenizer.template_variables - OWN_NAMES)
        known = ", ".join(name for name in names if changes_text(name, asked, tokenizer, {})) or "none"
        raise InputError(f"{flag}: the chat template reads no variable '{unread[0]:.60}'; it reads {known}")
    tokenizer.variables = variables
    return tokenizer
