"""The third door of README.md, run as it is printed: our ops under a model of transformers."""

import re
from contextlib import chdir
from pathlib import Path

import pytest
import torch
from burnish.model import embed

pytest.importorskip("transformers", reason="transformers is not installed")

ROOT = Path(__file__).parents[2]


def test_the_third_door(monkeypatch, ids):
    *_, code = re.findall(
        r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL
    )
    logits = []
    for name in ("apply", "remove"):
        function = getattr(embed, name)
        watched = lambda model, function=function: (
            function(model),
            logits.append(model(ids).logits.detach()),
        )
        monkeypatch.setattr(embed, name, watched)

    names: dict = {}
    with chdir(ROOT):
        exec(compile(code, "README.md", "exec"), names)
    embedded, removed = logits
    assert torch.equal(removed, names["model"](ids).logits) and not torch.equal(embedded, removed)
    torch.testing.assert_close(embedded, removed, atol=1e-5, rtol=1e-5)
