"""The evaluation on held-out pairs at the end of a run, kept in held_out.json: accuracy and margin."""

import json
from pathlib import Path

from torch import Tensor

from ...model.files.replacing import replacing
from .processes import rank


def report_held_out(folder: Path, **scores: Tensor) -> None:
    """Print accuracy and mean margin of scores, and write them to held_out.json in `folder`.

    scores: for each name, a tensor (pairs, 2) of the chosen and the rejected completions' scores. The accuracy is
    the share of pairs whose chosen score is larger. The standard error of an accuracy p over n pairs
    is sqrt(p (1 - p) / n).
    """
    results = {}
    for name, scores_of_pairs in scores.items():
        chosen, rejected = scores_of_pairs.unbind(1)
        p, n = (chosen > rejected).float().mean().item(), len(scores_of_pairs)
        error = (p * (1 - p) / n) ** 0.5
        margin = (chosen - rejected).mean().item()
        results[name] = {"accuracy": p, "standard_error": error, "margin": margin, "pairs": n}
        print(
            f"held out, {name}: accuracy {100 * p:.1f} ± {100 * error:.1f} %, margin {margin:.3g}, {n} pairs"
        )

    if rank():
        return
    with replacing(folder / "held_out.json") as beside:
        beside.write_text(json.dumps(results, indent=2) + "\n")
