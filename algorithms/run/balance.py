"""The balance loss of a mixture of experts in a run: what a micro-batch adds to its loss, and what a step logs.

    loss of the step + coefficient * sum over micro-batches (its share of the tokens) (its balance)

A balance is a product of two means, so that of a batch is not the mean of its parts': each micro-batch of each process
has its own, as in transformers and TRL, which weigh all micro-batches alike. docs/moe.md says which tokens count.
"""

from typing import Any

import torch
from torch import Tensor

from ...model.errors import InputError
from ...model.moe import pooled_balance
from ...model.scalar import ScalarModel
from ...model.transformer import Transformer
from .processes import sum_over_processes


class Balance:
    """balance = Balance(cfg, model)              Raises InputError for flags that models without experts ignore.

    (loss + balance.loss(share)).backward()    behind every forward pass that is trained
    run.log(metrics | balance.metrics())       once a step

    critic: a second model that is trained. Its balance is in no metric.
    """

    def __init__(self, cfg: Any, model: Transformer | ScalarModel, critic: ScalarModel | None = None):
        self.model = model
        self.coefficient, self.pooled = cfg.router_aux_loss_coef, cfg.balance == "pooled"
        layers, width = _layers_and_experts(model)
        flags = {"router-aux-loss-coef": self.coefficient is not None, "balance": not self.pooled}
        if not layers and (critic is None or not _layers_and_experts(critic)[0]):
            for flag in (name for name, given in flags.items() if given):
                raise InputError(f"--{flag}: {cfg.model} has no experts to balance: leave the flag out")
        self.counts = torch.zeros(layers, width, dtype=torch.int64, device=cfg.device)
        # share, share * balance, dropped
        self.sums = torch.zeros(3, dtype=torch.float64, device=cfg.device)

    def loss(self, share: float, critic: ScalarModel | None = None) -> Tensor:
        """The balance of the latest forward pass, times the coefficient and that pass's share of the step's tokens.

        Of the model's pass, or of the critic's where one is given.
        """
        body = self.model if critic is None else critic
        body = body.body if isinstance(body, ScalarModel) else body
        experts = body.config.experts
        if experts is not None and body.routing and share and critic is None:
            self.counts += torch.stack([layer.counts for layer in body.routing])  # (layers, E)
            balance = pooled_balance(body.routing, experts.top_k).detach().double()
            dropped = torch.stack([layer.dropped for layer in body.routing]).sum().double()
            self.sums += torch.stack([torch.full_like(balance, share), share * balance, dropped])
        return share * body.balance_loss(self.coefficient, pooled=self.pooled)

    def metrics(self) -> dict[str, float]:
        """Means over what was trained since the latest call, on all processes; empty without that or without experts.

        balance: pooled over layers, whichever of the two is trained; K where the load is even. busiest_expert: the
        largest load of one in any layer over the even load, 1 where it is even. dropped: choices whose expert was full.
        """
        if not self.counts.numel():
            return {}
        counts, (shares, balance, dropped) = self._over_processes()
        if not shares:
            return {}
        loads = counts * counts.shape[1] / counts.sum(1, keepdim=True).clamp(min=1)
        return {"balance": balance / shares, "busiest_expert": loads.max().item(), "dropped": dropped}

    def _over_processes(self) -> tuple[Tensor, list[float]]:
        """The counts (layers, E) and the three sums so far, which begin anew."""
        totals = sum_over_processes(torch.cat([self.sums, self.counts.flatten().double()]).cpu())
        self.counts.zero_()
        self.sums.zero_()
        return totals[3:].view(self.counts.shape), totals[:3].tolist()


def _layers_and_experts(model: Transformer | ScalarModel) -> tuple[int, int]:
    """How many layers have experts, and how many each of them has."""
    experts = model.config.experts
    return (0, 0) if experts is None else (sum(experts.layers), experts.num_experts)
