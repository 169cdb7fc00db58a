"""A model in training: its optimizer, its share of the experts' balance, and what a step's micro-batches add up to.

    policy = Learner(cfg, model)
    for batch in batches:
        policy.backward(loss, batch.share, metrics)    gradients and metrics add up
    metrics = policy.step(step)                        clip, AdamW, and the sums over all processes

A run trains one of them, or two: PPO's policy and its critic.
"""

from collections.abc import Mapping
from typing import Generic, TypeVar

from torch import Tensor

from ...model.scalar import ScalarModel
from ...model.transformer import Transformer
from .balance import Balance
from .flags import TrainingFlags
from .optimizer import make_optimizer, optimizer_step, scheduled
from .processes import summed

Model = TypeVar("Model", Transformer, ScalarModel)


class Learner(Generic[Model]):
    """model: what is trained. learning_rate: AdamW's at its peak, --learning-rate by default.

    The optimizer is made by `start`, once the processes share the model.
    """

    def __init__(
        self,
        cfg: TrainingFlags,
        model: Model,
        learning_rate: float | None = None,
        eps: float = 1e-8,
    ):
        self.model = model
        self.balance = Balance(model, cfg)
        self._cfg, self._eps = cfg, eps
        self._peak = cfg.learning_rate if learning_rate is None else learning_rate
        self._sums: dict[str, float] = {"loss": 0.0}

    def start(self) -> None:
        """Make the optimizer, of parameters that the processes share by now."""
        self.optimizer = make_optimizer(self.model, self._peak, self._cfg.weight_decay, self._eps)

    def learning_rate(self, step: int) -> float:
        """AdamW's at `step`, as --schedule and --warmup-steps say."""
        cfg = self._cfg
        return scheduled(self._peak, step, cfg.steps, cfg.warmup_steps, cfg.schedule)

    def backward(
        self,
        loss: Tensor,
        share: float,
        metrics: Mapping[str, float | Tensor] | None = None,
        means: Mapping[str, float | Tensor] | None = None,
    ) -> None:
        """Add a micro-batch's gradient, that of its experts' balance with it. share: of the step's tokens.

        metrics: numbers whose sums over the step's micro-batches, on all processes, `step` returns.
        means: numbers that are means over the micro-batch's tokens; `step` returns those over the step's.
        """
        (loss + self.balance.loss(share)).backward()
        for name, value in {"loss": loss.detach(), **(metrics or {})}.items():
            self._sums[name] = self._sums.get(name, 0.0) + float(value)
        for name, mean in (means or {}).items():  # NaN without a token
            self._sums[name] = self._sums.get(name, 0.0) + (float(mean) * share if share else 0.0)

    def step(self, step: int) -> dict[str, float]:
        """One step of AdamW at the rate of `step`. Returns the sums, grad_norm before clipping, and learning_rate.

        Raises InputError where loss or norm is not finite; the weights are then as before.
        """
        cfg = self._cfg
        sums, self._sums = summed(self._sums), {"loss": 0.0}
        rate = self.learning_rate(step)
        norm = optimizer_step(self.model, self.optimizer, sums["loss"], rate, cfg.max_grad_norm)
        return {**sums, "grad_norm": norm, "learning_rate": rate}
