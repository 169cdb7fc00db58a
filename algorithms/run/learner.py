"""A model in training, with its optimizer, its balance loss, and the metrics summed over a step's micro-batches.

    policy = Learner(cfg, model)
    for batch in batches:
        policy.backward(loss, batch.share, metrics)    gradients and metrics add up
    metrics = policy.step(step)                        clip, the optimizer's step, and the sums over all processes

A run has one learner, or two in PPO: policy and critic.
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
    """A model with its optimizer and the sums of a step's metrics.

    model: the model to train. learning_rate: the peak learning rate, --learning-rate by default. eps: AdamW's
    epsilon. `start` makes the optimizer, after the model has been sharded over the processes.
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
        """Make the optimizer. The model must already be sharded over the processes."""
        cfg = self._cfg
        self.optimizer = make_optimizer(self.model, self._peak, cfg.weight_decay, self._eps, cfg.optimizer)

    def learning_rate(self, step: int) -> float:
        """Return the learning rate at `step`, by --schedule and --warmup-steps."""
        cfg = self._cfg
        return scheduled(self._peak, step, cfg.steps, cfg.warmup_steps, cfg.schedule)

    def backward(
        self,
        loss: Tensor,
        share: float,
        metrics: Mapping[str, float | Tensor] | None = None,
        means: Mapping[str, float | Tensor] | None = None,
    ) -> None:
        """Add the gradients of a micro-batch's loss and of its balance loss.

        share: the micro-batch's share of the step's tokens. metrics: numbers that `step` returns as sums over all
        micro-batches of all processes. means: means over the micro-batch's tokens; `step` returns the means over the
        step's tokens.
        """
        (loss + self.balance.loss(share)).backward()
        for name, value in {"loss": loss.detach(), **(metrics or {})}.items():
            self._sums[name] = self._sums.get(name, 0.0) + float(value)
        for name, mean in (means or {}).items():  # a mean over no tokens is NaN
            self._sums[name] = self._sums.get(name, 0.0) + (float(mean) * share if share else 0.0)

    def step(self, step: int) -> dict[str, float]:
        """Take one step of the optimizer, at the learning rate of `step`.

        Returns the summed metrics, grad_norm before clipping, and learning_rate. Raises InputError, and leaves the
        weights as they are, if the loss or grad_norm is not finite.
        """
        cfg = self._cfg
        sums, self._sums = summed(self._sums), {"loss": 0.0}
        rate = self.learning_rate(step)
        norm = optimizer_step(self.model, self.optimizer, sums["loss"], rate, cfg.max_grad_norm)
        return {**sums, "grad_norm": norm, "learning_rate": rate}
