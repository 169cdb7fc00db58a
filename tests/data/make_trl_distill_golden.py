"""Write trl_distill.json: what TRL's GKD loss gives on stored logits: `python tests/data/make_trl_distill_golden.py`.

Made with trl 1.16.0, transformers 5.22.2, torch 2.13.0, on a CPU: GKDTrainer.generalized_jsd_loss and its gradient with
respect to the student's logits, in fp64, masked tokens left out and divided by a given number of tokens.
"""

import json
from itertools import product
from pathlib import Path

import torch

BETAS, TEMPERATURES, NUM_TOKENS = (0.0, 0.1, 0.5, 0.9, 1.0), (1.0, 2.5), 11
MASK = [[True, True, False, True], [False, True, True, True]]


def make_inputs() -> dict[str, list]:
    generator = torch.Generator().manual_seed(0)
    draw = lambda: (2 * torch.randn(2, 4, 7, generator=generator)).tolist()
    return {"student": draw(), "teacher": draw(), "mask": MASK}


def compute(inputs: dict[str, list]) -> dict[str, dict]:
    """beta and temperature -> TRL's loss, and its gradient for the logits of each token that is not masked."""
    from trl.experimental.gkd import GKDTrainer

    mask, found = torch.tensor(inputs["mask"]), {}
    labels = torch.where(mask, 1, -100)
    teacher = torch.tensor(inputs["teacher"], dtype=torch.float64)
    for beta, temperature in product(BETAS, TEMPERATURES):
        student = torch.tensor(inputs["student"], dtype=torch.float64, requires_grad=True)
        loss = GKDTrainer.generalized_jsd_loss(
            student, teacher, labels, beta, temperature, num_items_in_batch=NUM_TOKENS
        )
        (gradient,) = torch.autograd.grad(loss, student)
        found[f"{beta:g}, {temperature:g}"] = {"loss": loss.item(), "gradient": gradient[mask].tolist()}
    return found


if __name__ == "__main__":
    inputs = make_inputs()
    golden = {
        "made_by": "tests/data/make_trl_distill_golden.py with trl 1.16.0",
        "num_tokens": NUM_TOKENS,
        "inputs": inputs,
        "losses": compute(inputs),
    }
    Path(__file__).with_name("trl_distill.json").write_text(json.dumps(golden, indent=1) + "\n")
