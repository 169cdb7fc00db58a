"""Experts in place of the feed-forward layer, their names on disk, and how many parameters a model has.

    weights, indices = moe_route(x W_gate^T)          which experts each token goes to
    out = moe_mlp(x, ...)  (+ shared_expert(x), which every token goes to; with a gate times sigmoid(x w))

In memory a layer's experts are two tensors, gate_up (E, 2F, C), the gate's rows first, and down (E, C, F). On disk they
are three tensors for each expert, or with gpt-oss two of all experts, transposed, gate and up interleaved.

Source: https://arxiv.org/abs/2401.04088 (Mixtral), 2409.02060 (OLMoE), 2412.19437 (DeepSeek-V3), 2508.10925 (gpt-oss)
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import moe_mlp, moe_route
from .config import Experts, ModelConfig
from .linear import Linear

# ---- layers


class Router(nn.Module):
    """Logits of the experts (total, E) in fp32: which ones are chosen hangs on the last bits."""

    def __init__(self, config: ModelConfig, experts: Experts):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts.num_experts, config.hidden_size))
        self.bias = nn.Parameter(torch.empty(experts.num_experts)) if experts.clamped else None
        self.e_score_correction_bias: Tensor | None
        correction = torch.zeros(experts.num_experts) if experts.score == "sigmoid" else None
        self.register_buffer("e_score_correction_bias", correction)

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            bias = None if self.bias is None else self.bias.to(wide)
            return F.linear(x.to(wide), self.weight.to(wide), bias)


class ExpertWeights(nn.Module):
    def __init__(self, config: ModelConfig, experts: Experts):
        super().__init__()
        E, F_, C = experts.num_experts, experts.intermediate_size, config.hidden_size
        self.gate_up = nn.Parameter(torch.empty(E, 2 * F_, C))
        self.down = nn.Parameter(torch.empty(E, C, F_))
        self.gate_up_bias = nn.Parameter(torch.empty(E, 2 * F_)) if experts.clamped else None
        self.down_bias = nn.Parameter(torch.empty(E, C)) if experts.clamped else None


class MoE(nn.Module):
    """shared: the expert that every token goes to, a module of (x, now)."""

    def __init__(self, config: ModelConfig, experts: Experts, shared: nn.Module | None):
        super().__init__()
        self.gate = Router(config, experts)
        self.experts = ExpertWeights(config, experts)
        self.shared_expert = shared
        self.shared_expert_gate = Linear(config.hidden_size, 1, bias=False) if experts.shared_gate else None
        self.how = experts

    def forward(self, x: Tensor, now: Any) -> Tensor:
        """(total, C) to (total, C); what the router says of its choice goes to now.routed."""
        how, held = self.how, self.experts
        weights, indices, statistics = moe_route(
            self.gate(x),
            how.top_k,
            score=how.score,  # pyright: ignore[reportArgumentType]
            bias=self.gate.e_score_correction_bias,
            groups=how.groups,
            top_groups=how.top_groups,
            renormalize=how.renormalize,
            scale=how.scale,
        )
        now.routed.append(statistics)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        out = moe_mlp(
            x,
            held.gate_up.to(x.dtype),
            held.down.to(x.dtype),
            weights,
            indices,
            activation="clamped_swiglu" if how.clamped else "swiglu",
            gate_up_bias=None if held.gate_up_bias is None else held.gate_up_bias.to(x.dtype),
            down_bias=None if held.down_bias is None else held.down_bias.to(x.dtype),
            alpha=how.alpha,
            limit=how.limit,
        )
        if self.shared_expert is None:
            return out
        shared = self.shared_expert(x, now)
        if self.shared_expert_gate is not None:
            shared = self.shared_expert_gate(x, now.adapter).sigmoid() * shared
        return out + shared


# ---- names on disk


def disk_name(config: ModelConfig, name: str) -> str:
    """A parameter's name as transformers has it, from ours; those of experts' weights are `to_disk`'s."""
    if config.model_type == "mixtral":
        return name.replace(".mlp.", ".block_sparse_moe.")
    if config.model_type == "gpt_oss":
        return name.replace(".mlp.gate.", ".mlp.router.")
    if config.model_type == "deepseek_v3":
        return name.replace(".mlp.shared_expert.", ".mlp.shared_experts.")
    return name


def _parts(config: ModelConfig) -> tuple[str, str, str]:
    return ("w1", "w3", "w2") if config.model_type == "mixtral" else ("gate_proj", "up_proj", "down_proj")


def to_disk(config: ModelConfig, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our names and tensors -> the file's."""
    files: dict[str, Tensor] = {}
    gate_name, up_name, down_name = _parts(config)
    for name, tensor in state.items():
        at, _, which = name.rpartition(".experts.")
        if not at:
            files[disk_name(config, name)] = tensor
            continue
        at = f"{disk_name(config, at + '.')}experts"
        if config.model_type == "gpt_oss":
            if which.startswith("gate_up"):  # (E, 2F, ...), halves -> pairs
                tensor = tensor.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)
            name = which.replace("gate_up", "gate_up_proj").replace("down", "down_proj")
            files[f"{at}.{name}"] = (tensor if tensor.dim() == 2 else tensor.transpose(1, 2)).contiguous()
        elif which == "gate_up":
            for e, expert in enumerate(tensor):
                gate, up = expert.chunk(2)
                files[f"{at}.{e}.{gate_name}.weight"] = gate.contiguous()
                files[f"{at}.{e}.{up_name}.weight"] = up.contiguous()
        else:
            for e, expert in enumerate(tensor):
                files[f"{at}.{e}.{down_name}.weight"] = expert.contiguous()
    return files


def from_disk(config: ModelConfig, files: dict[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """The inverse of to_disk for our `names`; what none of them is made of stays. Empties `files`."""
    state: dict[str, Tensor] = {}
    gate_name, up_name, down_name = _parts(config)
    for name in names:
        at, _, which = name.rpartition(".experts.")
        if not at:
            if disk_name(config, name) in files:
                state[name] = files.pop(disk_name(config, name))
            continue
        at = f"{disk_name(config, at + '.')}experts"
        if config.model_type == "gpt_oss":
            tensor = files.pop(
                f"{at}.{which.replace('gate_up', 'gate_up_proj').replace('down', 'down_proj')}"
            )
            tensor = tensor if tensor.dim() == 2 else tensor.transpose(1, 2)
            if which.startswith("gate_up"):
                tensor = tensor.unflatten(1, (-1, 2)).transpose(1, 2).flatten(1, 2)
            state[name] = tensor.contiguous()
            continue
        assert config.experts is not None
        experts = range(config.experts.num_experts)
        if which == "gate_up":
            pairs = [
                torch.cat([files.pop(f"{at}.{e}.{part}.weight") for part in (gate_name, up_name)])
                for e in experts
            ]
            state[name] = torch.stack(pairs)
        else:
            state[name] = torch.stack([files.pop(f"{at}.{e}.{down_name}.weight") for e in experts])
    state |= files
    files.clear()
    return state
