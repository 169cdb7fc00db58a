"""Write trl_rl.json: what TRL's own GRPO loss gives on stored tensors: `python tests/data/make_trl_rl_golden.py`.

Made with trl 1.16.0, transformers 5.22.2, torch 2.13.0, on a CPU. GRPOTrainer._compute_loss runs on a stand-in for the
trainer that has the settings it reads and returns the stored log-probabilities; gradients are with respect to them.
"""

import json
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

LENGTHS = [5, 2, 7, 4, 1, 6]
WIDTH, MAX_LENGTH, BETA = max(LENGTHS), 12, 0.07
CASES: dict[str, dict[str, Any]] = {  # settings of TRL's
    "dapo": {"loss_type": "dapo"},
    "grpo": {"loss_type": "grpo"},
    "dr_grpo": {"loss_type": "dr_grpo"},
    "dual_clip": {"loss_type": "dapo", "delta": 1.3},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": (0.05, 0.08)},
    "cispo": {"loss_type": "cispo", "epsilon": (0.0, 1.4)},
    "k3": {"loss_type": "dapo", "beta": BETA},
    "rho_k3": {"loss_type": "dapo", "beta": BETA, "use_bias_correction_kl": True},
    "weights": {"loss_type": "dapo", "use_vllm": True},
}
EPSILON = (0.2, 0.28)


def make_inputs() -> dict[str, list]:
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator)
    real = torch.arange(WIDTH) < torch.tensor(LENGTHS)[:, None]
    logprob = -draw(6, WIDTH).abs() * real
    return {
        "lengths": LENGTHS,
        "advantage": draw(6).tolist(),
        "logprob": logprob.tolist(),  # 0 on padding
        "old_logprob": ((logprob + 0.4 * draw(6, WIDTH)) * real).tolist(),
        "ref_logprob": ((logprob + 0.4 * draw(6, WIDTH)) * real).tolist(),
        "weights": (0.3 * draw(6, WIDTH)).exp().clamp(max=1.2).tolist(),
    }


def compute(inputs: dict[str, list]) -> dict[str, dict[str, Any]]:
    """Name of a case -> TRL's loss, and its gradient for each real token."""
    from trl import GRPOTrainer

    given = {name: torch.tensor(values) for name, values in inputs.items()}
    mask = torch.arange(WIDTH) < given["lengths"][:, None]
    found = {}
    for name, settings in CASES.items():
        logprob = given["logprob"].clone().requires_grad_()
        same = lambda x, **_: x
        outputs = (logprob, torch.zeros_like(logprob), None)
        low, high = settings.get("epsilon", EPSILON)

        trainer = SimpleNamespace(
            model=SimpleNamespace(training=True),
            args=SimpleNamespace(
                delta=settings.get("delta"),
                use_bias_correction_kl=settings.get("use_bias_correction_kl", False),
                steps_per_generation=1,
            ),
            accelerator=SimpleNamespace(gather=same, reduce=same, gather_for_metrics=same, num_processes=1),
            _get_per_token_logps_and_entropies=lambda *_, outputs=outputs, **__: outputs,
            _metrics={"train": defaultdict(list)},
            _entropy_bonus_enabled=False,
            aux_loss_enabled=False,
            top_entropy_quantile=1.0,
            off_policy_mask_threshold=None,
            importance_sampling_level=settings.get("importance_sampling_level", "token"),
            beta=settings.get("beta", 0.0),
            loss_type=settings["loss_type"],
            epsilon_low=low,
            epsilon_high=high,
            use_vllm=settings.get("use_vllm", False),
            vllm_importance_sampling_correction=True,
            current_gradient_accumulation_steps=1,
            max_completion_length=MAX_LENGTH,
        )

        ids = torch.ones_like(mask).long()
        batch = {
            "prompt_ids": ids[:, :1],
            "prompt_mask": ids[:, :1],
            "completion_ids": ids,
            "completion_mask": mask.long(),
            "advantages": given["advantage"],
            "old_per_token_logps": given["old_logprob"],
            "ref_per_token_logps": given["ref_logprob"],
            "importance_sampling_ratio": given["weights"],
            "num_items_in_batch": mask.sum(),
        }

        loss = GRPOTrainer._compute_loss(trainer, None, batch)
        (gradient,) = torch.autograd.grad(loss, logprob)
        found[name] = {"loss": loss.item(), "gradient": gradient[mask].tolist()}
    return found


def overlong() -> list[float]:
    """TRL's soft overlong punishment of 0 to 12 tokens, with a buffer of 5 below 12."""
    from trl.rewards import get_soft_overlong_punishment

    return get_soft_overlong_punishment(12, 5)([[1] * n for n in range(13)])


if __name__ == "__main__":
    inputs = make_inputs()
    golden = {
        "made_by": "tests/data/make_trl_rl_golden.py with trl 1.16.0",
        "beta": BETA,
        "max_length": MAX_LENGTH,
        "inputs": inputs,
        "losses": compute(inputs),
        "overlong": overlong(),
    }
    Path(__file__).with_name("trl_rl.json").write_text(json.dumps(golden, indent=1) + "\n")
