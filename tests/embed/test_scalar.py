"""The folders of reward models beside transformers, live: the class that a config.json names, and its scores."""

import json

import pytest
import torch
from burnish.model.checkpoint import load_scalar_model, save_model
from burnish.model.packed import pack
from folders import GOLDEN

transformers = pytest.importorskip("transformers", reason="transformers is not installed")


@pytest.mark.parametrize("architecture", GOLDEN)
def test_transformers_reads_the_same_scores(data, tmp_path, architecture):
    model = load_scalar_model(data / "tiny-hf" / architecture)
    model.bias = 0.5
    save_model(model, tmp_path / "ours")
    named = json.loads((tmp_path / "ours" / "config.json").read_text())["architectures"]
    if (
        architecture == "olmoe"
    ):  # it has no such class: the name follows the pattern, and only we read the folder
        assert not hasattr(transformers, *named)
        return

    theirs, loading = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert [type(theirs).__name__] == named and not any(loading.values())
    assert theirs.config.num_labels == 1

    tokens = torch.arange(3, 12)
    with torch.no_grad():
        score = theirs(tokens[None]).logits
    values = model.values(pack([tokens.tolist()]), torch.tensor([8]))
    torch.testing.assert_close(score[0] + 0.5, values, atol=1e-5, rtol=0)

    theirs.save_pretrained(tmp_path / "theirs")
    back = load_scalar_model(tmp_path / "theirs")
    torch.testing.assert_close(
        back.values(pack([tokens.tolist()]), torch.tensor([8])), values, atol=1e-5, rtol=0
    )
