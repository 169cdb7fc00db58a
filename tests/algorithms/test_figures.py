"""The figures of held-out rows by hand, and of a model that has diverged."""

import math

import pytest
import torch
from burnish.algorithms.run.held_out import Figure, as_numbers
from burnish.algorithms.search.figures import judged_figure, mean_figure, ratio_figure, unpaired_figures


def test_values_of_figures_by_hand():
    assert judged_figure(torch.tensor([1.0, 3.0, math.nan])) == (2.0, pytest.approx(1.0), 2)
    assert math.isnan(judged_figure(torch.tensor([math.nan])).mean)
    ratio = ratio_figure(torch.tensor([2.0, 4.0]), [1, 2])
    assert ratio == (2.0, 0.0, 2)

    found = unpaired_figures(torch.tensor([1.0, 3.0]), torch.tensor([0.0, 1.0, 2.0, 5.0]))
    assert found["accuracy"].mean == (1 + 3) / 8  # 1 > 0; 3 > 0, 1, 2; a tie is wrong
    # shares below each wanted completion: 1/4, 3/4; above each unwanted one: 1, 1/2, 1/2, 0
    assert found["accuracy"].error == pytest.approx(math.sqrt(0.125 / 2 + (1 / 6) / 4))
    assert found["margin"].mean == 0 and found["margin"].count == 6
    assert math.isnan(unpaired_figures(torch.ones(2), torch.ones(0))["accuracy"].mean)


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_no_traceback_and_makes_no_figure_better(wrong):
    """A model that diverges on one row is not the mean of the others."""
    values = torch.tensor([1.0, wrong, 2.0])
    for figure in (mean_figure(values), ratio_figure(values, [1, 2, 1])):
        assert not math.isfinite(figure.mean) and math.isnan(figure.error)
    assert math.isnan(mean_figure(torch.tensor([math.inf, -math.inf])).mean)
    for pair in ((values, torch.ones(2)), (torch.ones(2), values)):
        assert math.isnan(unpaired_figures(*pair)["accuracy"].mean)
    assert as_numbers({"loss": Figure(wrong, wrong, 3)}) == {"loss": None, "loss_error": None}
