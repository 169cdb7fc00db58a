"""The text at the start of a run: what will happen, before the first step."""

from collections.abc import Mapping, Sequence

from ...model.adapter import linears, lora_config
from ...model.memory import nf4_bytes
from ...model.scalar import ScalarModel
from ...model.transformer import Transformer
from .batch import Item
from .flags import RolloutFlags, SamplingFlags, TrainingFlags
from .held_out import Evaluation
from .optimizer import state_bytes
from .order import default_of
from .processes import rank, world

MOST_COUNTED = 10_000  # rows of which the trained tokens are counted


def trained_tokens(items: Sequence[Item]) -> float:
    """Return the mean number of trained tokens of an item, counted on at most about MOST_COUNTED items."""
    some = items[:: max(1, len(items) // MOST_COUNTED)]
    return sum(completion.num_trained for item in some for completion in item.completions) / len(some)


def report_start(
    cfg: TrainingFlags,
    rows: int,
    tokens: float,
    models: Mapping[str, Transformer | ScalarModel],
    evaluation: Evaluation | None,
) -> None:
    """Print the steps, the learning rate, the trained weights, the memory, the evaluation and the files of a run.

    rows: the rows of an epoch. tokens: the mean trained tokens of a row; 0 if they are sampled. models: the models that
    are trained, by name.
    """
    if rank():
        return
    lines = [
        _steps(cfg, rows, tokens),
        _learning_rate(cfg),
        *(_weights(name, model) for name, model in models.items()),
        _memory(cfg, [*models.values()]),
        _evaluations(cfg, evaluation),
        _files(cfg),
    ]
    if hint := _hint(cfg):
        lines.insert(2, hint)
    print("\n".join(line for line in lines if line))


def _steps(cfg: TrainingFlags, rows: int, tokens: float) -> str:
    passes = cfg.steps / -(-rows // cfg.rows_per_step)
    text = f"{_counted(cfg.steps, 'step')} of {_counted(min(rows, cfg.rows_per_step), 'row')}: "
    text += f"{passes:.3g} epoch{'s' * (passes != 1)} of {_counted(rows, 'row')}"
    if tokens:
        return f"{text}, about {tokens * min(rows, cfg.rows_per_step):,.0f} trained tokens a step"
    if isinstance(cfg, SamplingFlags):
        group = cfg.group_size if isinstance(cfg, RolloutFlags) else 1
        most = min(rows, cfg.rows_per_step) * group * cfg.max_new_tokens
        return f"{text}, at most {most:,} sampled tokens a step"
    return text


def _learning_rate(cfg: TrainingFlags) -> str:
    peak, warmup, total = cfg.learning_rate, cfg.warmup_steps, f"{cfg.steps:,}"
    if warmup > cfg.steps:
        reached = peak * cfg.steps / warmup
        return (
            f"learning rate: only up to {reached:.3g} of {peak:g}, because the warm-up takes {warmup:,} steps and the "
            f"run has {total} (--warmup-steps)"
        )
    if warmup == cfg.steps:
        return f"learning rate: reaches {peak:g} in the last of {total} steps, because all are warm-up (--warmup-steps)"
    after = "stays there" if cfg.schedule == "constant" else f"falls to 0 by the end ({cfg.schedule})"
    start = f"reaches {peak:g} after {warmup:,} of {total} steps" if warmup else f"starts at {peak:g}"
    return f"learning rate: {start}, then {after}"


def _hint(cfg: TrainingFlags) -> str:
    """Return advice on the learning rate of LoRA, if it is the default, which is made for training whole weights."""
    if not cfg.lora_rank or cfg.learning_rate != default_of(cfg, "learning_rate"):
        return ""
    return (
        f"hint: {cfg.learning_rate:g} is the default for whole weights; LoRA usually takes a rate about ten times as "
        f"large (--learning-rate {10 * cfg.learning_rate:g})"
    )


def _weights(name: str, model: Transformer | ScalarModel) -> str:
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    quantized = sum(layer.numel for layer in linears(model).values() if layer.four_bit is not None)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad) + quantized
    if lora_config(model) is None:
        return f"{name}: all {short(trained)} weights are trained"
    in_4bit = " in 4 bits" if quantized else ""
    return f"{name}: a LoRA adapter of {short(trained)} weights is trained, beside {short(frozen)} frozen{in_4bit}"


def _memory(cfg: TrainingFlags, models: Sequence[Transformer | ScalarModel]) -> str:
    total = sum(_bytes(cfg, model) for model in models)
    where = " of each process" if world() > 1 else ""
    return (
        f"memory{where}: {short(total)}B for weights, gradients and optimizer, beside activations "
        "(burnish memory counts all of a run)"
    )


def _bytes(cfg: TrainingFlags, model: Transformer | ScalarModel) -> int:
    """Return the bytes that a process holds of a trained model: weights, gradients, and the optimizer's states."""
    parameters = [*model.parameters()]
    weights = sum(p.numel() * p.element_size() for p in parameters)
    gradients = sum(p.numel() * p.element_size() for p in parameters if p.requires_grad)
    quantized = sum(nf4_bytes(layer.numel) for layer in linears(model).values() if layer.four_bit is not None)
    return (weights + gradients + state_bytes(cfg.optimizer, model)) // world() + quantized


def _evaluations(cfg: TrainingFlags, evaluation: Evaluation | None) -> str:
    if evaluation is None:
        return ""
    every = f", {_every(cfg.eval_every)}" if cfg.eval_every else ""
    best = f"; keeps the best model by {cfg.keep_best}" if cfg.keep_best is not None else ""
    rows = f"{evaluation.count:,} held-out {evaluation.items}"
    return f"evaluates on {rows} before training{every} and at the end{best}"


def _files(cfg: TrainingFlags) -> str:
    every = f", and a checkpoint {_every(cfg.save_every)}" if cfg.save_every else ""
    return f"writes {cfg.output}: the model at the end{every or '; no checkpoints (--save-every)'}"


def _every(steps: int) -> str:
    return "every step" if steps == 1 else f"every {steps:,} steps"


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}" + "s" * (count != 1)


def short(count: int) -> str:
    """Return a count of weights in short form, such as 134.5 M."""
    for limit, unit in ((1e9, " B"), (1e6, " M"), (1e3, " k")):
        if count >= limit:
            return f"{count / limit:.1f}{unit}"
    return f"{count}"
