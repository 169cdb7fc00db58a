"""The balance loss of a mixture of experts in a run: what a micro-batch adds to its loss, and what a step logs.

    loss of the step + coefficient * sum over micro-batches (its share of the tokens) (its balance)

A balance is a product of two means, so that of a batch is not the mean of its parts': each micro-batch of each process
has its own, as in transformers and TRL, which weigh all micro-batches alike. docs/moe.md says which tokens count.
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
    """balance = Balance(model, cfg)

    (loss + balance.loss(share)).backward()    behind every forward pass that is trained
    run.log(metrics | balance.metrics())       once a step
    """

    def __init__(self, model: Transformer | ScalarModel, cfg: TrainingFlags):
        self._body = model.body if isinstance(model, ScalarModel) else model
        self._coefficient, self._pooled = cfg.router_aux_loss_coef, cfg.balance == "pooled"
        self._counts = torch.zeros(_layers_and_experts(model), dtype=torch.int64, device=cfg.device)
        # share, share * balance, dropped
        self._sums = torch.zeros(3, dtype=torch.float64, device=cfg.device)

    def loss(self, share: float) -> Tensor:
        """The balance of the latest forward pass, times the coefficient and that pass's share of the step's tokens."""
        body, experts = self._body, self._body.config.experts
        if experts is not None and body.routing and share:
            self._counts += torch.stack([layer.counts for layer in body.routing])  # (layers, E)
            balance = pooled_balance(body.routing, experts.top_k).detach().double()
            dropped = torch.stack([layer.dropped for layer in body.routing]).sum().double()
            self._sums += torch.stack([torch.full_like(balance, share), share * balance, dropped])
        return share * body.balance_loss(self._coefficient, pooled=self._pooled)

    def metrics(self) -> dict[str, float]:
        """Means over what was trained since the latest call, on all processes; empty without that or without experts.

        balance: pooled over layers, whichever of the two is trained; K where the load is even. busiest_expert: the
        largest load of one in any layer over the even load, 1 where it is even. dropped: choices whose expert was full.
        """
        if not self._counts.numel():
            return {}
        counts, (shares, balance, dropped) = self._over_processes()
        if not shares:
            return {}
        loads = counts * counts.shape[1] / counts.sum(1, keepdim=True).clamp(min=1)
        return {"balance": balance / shares, "busiest_expert": loads.max().item(), "dropped": dropped}

    def _over_processes(self) -> tuple[Tensor, list[float]]:
        """The counts (layers, E) and the three sums so far, which begin anew."""
        totals = sum_over_processes(torch.cat([self._sums, self._counts.flatten().double()]).cpu())
        self._counts.zero_()
        self._sums.zero_()
        return totals[3:].view(self._counts.shape), totals[:3].tolist()


def _layers_and_experts(model: Transformer | ScalarModel) -> tuple[int, int]:
    """The number of layers with experts, and the number of experts of each."""
    experts = model.config.experts
    return (0, 0) if experts is None else (sum(experts.layers), experts.num_experts)


def check_balance(cfg: TrainingFlags, models: Sequence[Transformer | ScalarModel]) -> None:
    """Refuse flags of the balance where none of the trained models has experts."""
    flags = {"router-aux-loss-coef": cfg.router_aux_loss_coef is not None, "balance": cfg.balance != "pooled"}
    if not any(_layers_and_experts(model)[0] for model in models):
        for flag in (name for name, given in flags.items() if given):
            raise InputError(f"--{flag}: {cfg.model} has no experts to balance: leave the flag out")
