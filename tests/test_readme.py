"""README's first screen: its doors run as printed, and it stays short. tests/embed runs the third door."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
KERNEL, ALGORITHM, TRAINER = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
GROWTH = """
import resource
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
import torch; import burnish.kernels
torch.set_num_threads(1)
before = peak()
{code}
assert torch.isfinite(head.grad).all()
print("grown by", (peak() - before) * 1024)
"""


@pytest.mark.slow
def test_the_first_door_holds_no_logits():
    """8,192 x 151,936 logits take 5 GB. The code says that all of it takes 0.2 GB."""
    done = subprocess.run(
        [sys.executable, "-c", GROWTH.format(code=KERNEL)], capture_output=True, text=True, check=True
    )
    assert "0.2 GB" in KERNEL and float(done.stdout.split("grown by")[1]) < 0.25e9


def test_the_second_door():
    names: dict = {}
    exec(compile(ALGORITHM, "README.md", "exec"), names)
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0])
    advantage = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
    torch.testing.assert_close(names["advantage"], advantage)
    torch.testing.assert_close(names["logprob"].grad, -advantage / 4)


def test_each_door_has_four_to_six_lines():
    for code in (KERNEL, ALGORITHM, TRAINER):
        lines = [line for line in code.splitlines() if line and not line.startswith(("import", "from"))]
        assert 4 <= len(lines) <= 6


def test_it_is_one_screen_with_one_picture():
    assert len(README.splitlines()) <= 120
    assert len(re.findall(r"!\[", README)) == 1


def test_the_index_lists_every_page():
    index = (ROOT / "docs" / "README.md").read_text()
    linked = set(re.findall(r"\]\(([\w-]+\.md)", index))
    assert linked == {page.name for page in ROOT.glob("docs/*.md")} - {"README.md"}
    assert "(docs/README.md)" in README
