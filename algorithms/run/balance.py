"""The balance loss of a mixture of experts in a run: the loss of each micro-batch, and the metrics of each step.

    loss of the step + coefficient * sum over micro-batches of (share of the step's tokens) * (balance)

A balance is a product of two means, so the balance of a batch is not the mean of its micro-batches' balances. Each
micro-batch of each process therefore has its own balance. transformers and TRL do the same, but weight all
micro-batches equally. docs/moe.md says which tokens count.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ...model.errors import InputError
from ...model.moe import pooled_balance
from ...model.scalar import ScalarModel
from ...model.transformer import Transformer
from .flags import TrainingFlags
from .processes import sum_over_processes


class Balance:
    """The balance loss of one model and its metrics. Without experts the loss is 0 and there are no metrics.

    balance = Balance(model, cfg)
    (loss + balance.loss(share)).backward()    after every forward pass that is trained
    run.log(metrics | balance.metrics())       once per step
    """

    def __init__(self, model: Transformer | ScalarModel, cfg: TrainingFlags):
        self._body = model.body if isinstance(model, ScalarModel) else model
        self._coefficient, self._pooled = cfg.router_aux_loss_coef, cfg.balance == "pooled"
        self._counts = torch.zeros(_layers_and_experts(model), dtype=torch.int64, device=cfg.device)
        # share, share * balance, dropped
        self._sums = torch.zeros(3, dtype=torch.float64, device=cfg.device)

    def loss(self, share: float) -> Tensor:
        """Return the load-balancing loss of the latest forward pass, times its coefficient and `share`.

        share: the pass's share of the step's tokens.
        """
        body, experts = self._body, self._body.config.experts
        if experts is not None and body.routing and share:
            self._counts += torch.stack([layer.counts for layer in body.routing])  # (layers, E)
            balance = pooled_balance(body.routing, experts.top_k).detach().double()
            dropped = torch.stack([layer.dropped for layer in body.routing]).sum().double()
            self._sums += torch.stack([torch.full_like(balance, share), share * balance, dropped])
        return share * body.balance_loss(self._coefficient, pooled=self._pooled)

    def metrics(self) -> dict[str, float]:
        """Return metrics of the micro-batches trained since the last call, over all processes.

        balance: the mean balance, always pooled over layers; it is K (experts per token) if the load is even.
        busiest_expert: the largest load of an expert in any layer, as a multiple of an even load.
        dropped: the number of choices whose expert was full. Returns {} without experts or without micro-batches.
        """
        if not self._counts.numel():
            return {}
        counts, (shares, balance, dropped) = self._over_processes()
        if not shares:
            return {}
        loads = counts * counts.shape[1] / counts.sum(1, keepdim=True).clamp(min=1)
        return {"balance": balance / shares, "busiest_expert": loads.max().item(), "dropped": dropped}

    def _over_processes(self) -> tuple[Tensor, list[float]]:
        """Return sums over all processes: the expert counts (layers, E), and [share, share * balance, dropped choices].

        share is a pass's share of the step's tokens, balance its load-balancing loss. This process's counts and sums
        are then reset to 0.
        """
        totals = sum_over_processes(torch.cat([self._sums, self._counts.flatten().double()]).cpu())
        self._counts.zero_()
        self._sums.zero_()
        return totals[3:].view(self._counts.shape), totals[:3].tolist()


def _layers_and_experts(model: Transformer | ScalarModel) -> tuple[int, int]:
    """Return (layers with experts, experts per layer)."""
    experts = model.config.experts
    return (0, 0) if experts is None else (sum(experts.layers), experts.num_experts)


def check_balance(cfg: TrainingFlags, models: Sequence[Transformer | ScalarModel]) -> None:
    """Raise InputError if a flag of the balance is set but no trained model has experts."""
    flags = {"router-aux-loss-coef": cfg.router_aux_loss_coef is not None, "balance": cfg.balance != "pooled"}
    if not any(_layers_and_experts(model)[0] for model in models):
        for flag in (name for name, given in flags.items() if given):
            raise InputError(f"--{flag}: {cfg.model} has no experts to balance: leave the flag out")
