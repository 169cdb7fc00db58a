"""The tiles that a card takes: its own, those of the card that asks for least, or a refusal in one sentence."""

from types import SimpleNamespace

import pytest
import torch
from burnish.kernels import _chip


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch):
    """card((8, 6)): a tensor that says that it lies on such a card, of NVIDIA or else of AMD."""

    def of(capability: tuple[int, int], hip: str | None = None):
        _chip._capability.cache_clear()
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Stub")
        return SimpleNamespace(is_cuda=True, device=torch.device("cuda", 1))

    yield of
    _chip._capability.cache_clear()


@pytest.mark.parametrize("capability", [(7, 5), (7, 0), (6, 1)], ids=str)
def test_an_older_card_is_refused_in_one_sentence(card, capability):
    sentence = "cuda:1: expected a GPU of compute capability 8.0 or newer, got NVIDIA Stub ({}.{})".format(
        *capability
    )
    x = card(capability)
    for ask in (_chip.use_triton, _chip.capability):
        with pytest.raises(ValueError) as caught:
            ask(x)
        assert str(caught.value) == sentence


@pytest.mark.parametrize(
    "capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0), (12, 1)], ids=str
)
def test_a_known_card_takes_its_own(card, capability):
    x = card(capability)
    assert _chip.use_triton(x) and _chip.capability(x) == capability


@pytest.mark.parametrize("capability", [(11, 0), (13, 0), (20, 1)], ids=str)
def test_an_unknown_card_takes_the_tiles_that_ask_for_least(card, capability):
    """99 KB of shared memory, no tensor descriptors, no tensor memory: whatever Triton compiles for runs them."""
    x = card(capability)
    assert _chip.use_triton(x) and _chip.capability(x) == (12, 0)


@pytest.mark.parametrize("capability", [(9, 0), (9, 4), (9, 5), (11, 0)], ids=str)
def test_a_card_of_amd_takes_those_of_the_mi300x(card, capability):
    """(9, 0) is an MI200 there, and no H100; (11, 0) is no Blackwell."""
    x = card(capability, hip="7.0")
    assert _chip.use_triton(x) and _chip.capability(x) == (9, 4)
