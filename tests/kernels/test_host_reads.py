"""No op waits for a GPU: its Triton path, forward and backward, and a model's steps read no number on the host.

Nothing is launched: a launch returns at once, and what it would have written is 0.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from burnish.bench.cases.case import Case, make_inputs, make_upstream, run
from burnish.bench.cases.registry import CASES
from burnish.bench.ops.static import compile_only
from burnish.kernels import _chip, _op
from burnish.model import ModelConfig, Transformer, Vocabulary, pack
from burnish.model.adapter import add_lora
from faults import Fault, check_of, control, faults_of
from torch.utils._python_dispatch import TorchDispatchMode

pytestmark = pytest.mark.skipif(_chip.INTERPRET, reason="launches are left out, not interpreted")

READS = {
    *("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "repeat_interleave"),
    *("_unique2", "unique_dim", "unique_consecutive", "bincount", "histc"),
}
MADE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
COPIES = {"cpu", "numpy", "tolist", "__array__"}  # of a CPU tensor they call no op


class NoHostRead(TorchDispatchMode):
    """Refuses what has to know a tensor's numbers, or sizes that depend on them."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        indices = (
            args[1] if name.startswith(("index", "_index")) and isinstance(args[1], list | tuple) else ()
        )
        masks = [i for i in indices if i is not None and i.dtype in (torch.bool, torch.uint8)]
        assert (name not in READS or kwargs.get("output_size") is not None) and not masks, (
            f"{func} waits for a GPU"
        )
        found = func(*args, **kwargs)
        return found.zero_() if name in MADE else found


def _refused(*_: Any, **__: Any) -> Any:
    raise AssertionError("a copy on the host waits for a GPU")


@contextmanager
def no_host_reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Inside, ops take the Triton path of a GPU, and each aten op of theirs is seen."""
    monkeypatch.setattr(_op, "_recorded", lambda args: False)  # a registered op hides what it is made of
    with monkeypatch.context() as patch, compile_only("sm_90", kernel="none"), NoHostRead():
        for name in COPIES:
            patch.setattr(torch.Tensor, name, _refused)
        yield


@control
def reads_nothing(op: Callable[..., Any], case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = make_inputs(case, case.shapes[-1], torch.float16, "cpu")
    upstream = make_upstream(case, tensors)
    with no_host_reads(monkeypatch):
        run(op, case, tensors, upstream)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_an_op_reads_nothing_on_the_host(case: Case, monkeypatch: pytest.MonkeyPatch):
    reads_nothing(case.fused, case, monkeypatch)


@pytest.mark.parametrize("adapted", [False, True])
def test_scoring_reads_nothing_on_the_host(adapted: bool, monkeypatch: pytest.MonkeyPatch):
    """The step of a rollout is held in tests/model/test_generate.py."""
    config = ModelConfig(*(31, 16, 24, 2, 2), tie_word_embeddings=not adapted)
    model = Transformer(config)
    if adapted:
        add_lora(model, rank=2, targets=("lm_head", "q_proj"))
    packed, rows = pack([[3, 4, 5], [6, 7], [8, 9]], parents=[-1, 0, 0]), torch.arange(1, 7)
    support = torch.stack((packed.tokens[rows], torch.arange(10, 16)), 1).int()
    with no_host_reads(monkeypatch):
        for more in ({}, {"support": support}, {"vocabulary": Vocabulary.of(range(1, 29))}):
            logprob, lse, entropy = model.score(packed, rows, **more)
            (logprob.sum() + lse.sum() + entropy.sum()).backward()


@pytest.mark.parametrize("fault", faults_of(__file__), ids=lambda fault: fault.id)
def test_a_read_that_is_planted_is_found(fault: Fault, copy_of, monkeypatch: pytest.MonkeyPatch):
    case = next(case for case in CASES if case.name == fault.on)
    op = getattr(copy_of(fault.file, fault), case.op)
    with pytest.raises(AssertionError, match="waits for a GPU"):
        check_of(fault)(op, case, monkeypatch)
