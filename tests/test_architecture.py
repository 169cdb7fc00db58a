"""The structure of the tree, held by a test: floors, rooms, reading order, size, names.

Each rule is a function from a file's name and source to its faults; they stand in tests/architecture/. Every file must
have none, and for every rule there is a planted source in which it must find one, for a check that cannot fail is a
defect. A file that is yet to be rewritten stands in tests/architecture/exempt.toml with the rules that it breaks; one
that breaks a rule no more is a fault as long as it stands there.
"""

import runpy
from unittest.mock import patch

import pytest
from general import (
    MOST_LINES_OF_A_FILE,
    algorithm_files_read_in_one_order,
    algorithms_never_import_one_another,
    docstrings_start_with_a_phrase,
    files_are_short,
    floor_0_stands_on_torch_and_triton,
    functions_are_short,
    functions_have_paragraphs,
    functions_take_few_parameters,
    gradients_and_inputs_go_by_name,
    imports_point_down,
    losses_require_their_denominator,
    optional_packages_are_imported_on_demand,
    precision_is_decided_once,
    the_formatter_is_not_fought,
)
from of_kernels import (
    circle,
    every_op_has_its_reference,
    kernel_files_read_in_one_order,
    kernel_files_say_what_they_compute,
    kernels_name_their_arguments,
    no_op_hides_its_module,
    references_use_all_they_take,
    rooms_import_what_they_may,
    what_stands_under_op_is_exported,
)
from sources import ALGORITHMS, EXEMPT, FILES, FLOORS, KERNELS, PUBLIC, ROOT, functions, is_reference

RULES = {
    imports_point_down: FILES,
    floor_0_stands_on_torch_and_triton: FILES,
    optional_packages_are_imported_on_demand: FILES,
    rooms_import_what_they_may: KERNELS,
    algorithms_never_import_one_another: FILES,
    kernel_files_say_what_they_compute: KERNELS,
    kernel_files_read_in_one_order: KERNELS,
    what_stands_under_op_is_exported: KERNELS,
    every_op_has_its_reference: KERNELS,
    references_use_all_they_take: KERNELS,
    no_op_hides_its_module: KERNELS,
    kernels_name_their_arguments: FILES,
    precision_is_decided_once: FILES,
    algorithm_files_read_in_one_order: ALGORITHMS,
    losses_require_their_denominator: FILES,
    functions_take_few_parameters: FILES,
    functions_are_short: FILES,
    files_are_short: FILES,
    functions_have_paragraphs: FILES,
    the_formatter_is_not_fought: FILES,
    gradients_and_inputs_go_by_name: FILES,
    docstrings_start_with_a_phrase: FILES,
}
NAMES = [rule.__name__ for rule in RULES]


def stale(exempt, files):
    """The lines of an exemption list that exempt nothing: no such file or rule, or a rule that the file keeps."""
    rules = {rule.__name__: rule for rule in RULES}
    for name, broken in exempt.items():
        if name not in files or not broken:
            yield f"{name}: no such file, or no rule"
            continue
        for rule in broken:
            if rule not in rules:
                yield f"{name}: no rule is named {rule}"
            elif not any(rules[rule](name, files[name])):
                yield f"{name} keeps {rule}: take it from the list"


@pytest.mark.parametrize("rule, files", RULES.items(), ids=NAMES)
def test_rule(rule, files):
    assert files
    bound = {name: source for name, source in files.items() if rule.__name__ not in EXEMPT.get(name, [])}
    faults = [fault for name, source in bound.items() for fault in rule(name, source)]
    assert not faults, "\n".join(faults)


def test_the_list_of_exemptions_only_shrinks():
    faults = list(stale(EXEMPT, FILES))
    assert not faults, "\n".join(faults)
    assert not EXEMPT.keys() & KERNELS.keys(), "kernels/ is rewritten: no rule spares a file of it"


def test_no_circles():
    assert not circle(KERNELS)


def test_the_list_of_ops_is_the_api():
    referenced = {
        node.name.removesuffix("_reference")
        for source in KERNELS.values()
        for node in functions(source)
        if is_reference(node)
    }
    types = {"NF4Weight"}  # what ops take and return beside tensors
    assert referenced | types == PUBLIC


def test_one_level_of_rooms():
    """A file lies in a folder or in a room of it, and setup.py lists both."""
    nested = [p for folder in FLOORS for p in (ROOT / folder).glob("*/*/**/*.py")]
    assert not nested, f"expected one level of rooms: {nested}"
    places = {name.rpartition("/")[0] for name in FILES}
    assert all(f"{place}/__init__.py" in FILES for place in places)
    with patch("setuptools.setup") as setup:
        runpy.run_path(str(ROOT / "setup.py"))
    given = setup.call_args.kwargs
    assert given["package_dir"] == {f"burnish.{place.replace('/', '.')}": place for place in places}
    assert sorted(given["packages"]) == sorted(given["package_dir"])


# ---- controls

KERNEL = '''"""Maths.

    y = x
    Traffic: none.

Source: somewhere
"""

from ._op import make_op
from ._triton import tl, triton

# ---- reference


def rms_norm_reference(x, eps=1e-6, *, flag=False):
    """The truth."""
    return x + eps * flag


# ---- kernels


# fmt: off
@triton.jit
def _rms_norm_fwd(x_ptr, N, BLOCK: tl.constexpr):
    pass
# fmt: on


# ---- launch


def _forward(a, b, c, d, e, f, g, h):
    first = 1

    # a step
    return first


# ---- op


def rms_norm(x, eps=1e-6, *, memory_budget=None, flag=False):
    return x
'''
ALGORITHM = '''"""Maths.

Source: somewhere
Run:    burnish x
"""


class Config:
    pass


def x_loss(logprob, num_tokens):
    return -logprob.sum() / num_tokens


def train(cfg):
    pass


if __name__ == "__main__":
    train(Config())
'''
_SWAPPED = ALGORITHM.replace("def train(cfg)", "def y_loss(num_tokens)").replace("def x_loss", "def train")
_STEPS = "    x = 1\n" * 8


def _of_lines(count, head="def f():"):
    """A function of that many lines, with paragraphs."""
    return f"{head}\n" + "".join("    x = 1\n" if i % 9 else "\n" for i in range(1, count))


@pytest.mark.parametrize("rule", RULES, ids=NAMES)
def test_a_clean_file_has_no_fault(rule):
    name, source = (
        ("algorithms/x.py", ALGORITHM) if "algorithm" in rule.__name__ else ("kernels/norm.py", KERNEL)
    )
    assert list(rule(name, source)) == []


@pytest.mark.parametrize(
    "rule, name, source",
    [
        (functions_take_few_parameters, "model/x.py", "class A:\n    def f(self, a, b, c, d, e, f, g, h): ..."),
        (functions_take_few_parameters, "model/generate.py", "def stream(a, b, c, d, e, f, g, h, *, i): ..."),
        (functions_are_short, "kernels/x.py", _of_lines(60)),
        (functions_are_short, "kernels/x.py", _of_lines(100, "@triton.jit\ndef f():")),
        (functions_are_short, "algorithms/x.py", _of_lines(80, "def train(cfg):")),
        (functions_are_short, "kernels/x.py", _of_lines(61, "def rms_norm(\n    x,\n):")),
        (files_are_short, "kernels/lora.py", "\n" * 650),
        (functions_have_paragraphs, "kernels/x.py", f"def f():\n{_STEPS}    # a step\n{_STEPS}\n{_STEPS}"),
        (functions_have_paragraphs, "kernels/x.py", "def f():\n    return [\n" + "        1,\n" * 30 + "    ]"),
        (the_formatter_is_not_fought, "kernels/x.py", "x = '# fmt: skip'"),
        (gradients_and_inputs_go_by_name, "kernels/x.py", "a = inputs[3], rest[-1], others[7], [0] * 4, rest[:2]"),
        (docstrings_start_with_a_phrase, "kernels/x.py", '"""Offsets of rows, as a kernel reads them."""'),
        (rooms_import_what_they_may, "kernels/head/topk.py", "from . import blocks\nfrom .._chip import TARGET"),
        (rooms_import_what_they_may, "kernels/attention.py", "from .plain.attention import f\nfrom . import tiles"),
        (rooms_import_what_they_may, "kernels/moe.py", "from .nf4 import product\nfrom .route import counts"),
        (kernel_files_read_in_one_order, "kernels/plain/norm.py", "def rms_norm_reference(x):\n    return x"),
        (kernel_files_read_in_one_order, "kernels/x.py", "# ---- kernels\n# ---- blocks\n# ---- op"),
    ],
)  # fmt: skip
def test_what_a_rule_allows(rule, name, source):
    assert list(rule(name, source)) == []


@pytest.mark.parametrize(
    "rule, name, source",
    [
        (imports_point_down, "kernels/x.py", "from ..model.packed import Packed"),
        (imports_point_down, "kernels/head/x.py", "from ...model.packed import Packed"),
        (imports_point_down, "model/x.py", "def f():\n    from burnish.bench import registry"),
        (imports_point_down, "algorithms/x.py", "import burnish.bench.registry"),
        (imports_point_down, "model/x.py", "from .. import algorithms"),
        (floor_0_stands_on_torch_and_triton, "kernels/x.py", "import numpy as np"),
        (floor_0_stands_on_torch_and_triton, "kernels/plain/x.py", "from numpy import array"),
        (optional_packages_are_imported_on_demand, "model/x.py", "if True:\n    from transformers import Trainer"),
        (optional_packages_are_imported_on_demand, "bench/x.py", "def f():\n    pass\nimport trl.trainer"),
        (precision_is_decided_once, "kernels/x.py", "tf32 = torch.backends.cuda.matmul.allow_tf32"),
        (precision_is_decided_once, "model/x.py", "from torch import is_autocast_enabled as enabled"),
        (precision_is_decided_once, "bench/x.py", "getattr(torch, 'get_autocast_dtype')('cpu')"),
        (precision_is_decided_once, "bench/x.py", "torch.backends.fp32_precision = 'tf32'"),
        (rooms_import_what_they_may, "kernels/rope.py", "from .norm import rms_norm"),
        (rooms_import_what_they_may, "kernels/rope.py", "from . import norm"),
        (rooms_import_what_they_may, "kernels/rope.py", "from burnish.kernels.norm import rms_norm"),
        (rooms_import_what_they_may, "kernels/rope.py", "from burnish.kernels import _chip"),
        (rooms_import_what_they_may, "kernels/rope.py", "from . import rms_norm"),
        (rooms_import_what_they_may, "kernels/rope.py", "from .head.blocks import scaled_logits"),
        (rooms_import_what_they_may, "kernels/head/topk.py", "from .divergence import token_divergence"),
        (rooms_import_what_they_may, "kernels/head/blocks.py", "from ..norm import rms_norm"),
        (rooms_import_what_they_may, "kernels/plain/moe.py", "from ..moe import moe_mlp"),
        (rooms_import_what_they_may, "kernels/records.py", "from .plain.moe import Activation"),
        (rooms_import_what_they_may, "kernels/tiles.py", "from .nf4 import product"),
        (algorithms_never_import_one_another, "algorithms/x.py", "from .sft import sft_loss"),
        (algorithms_never_import_one_another, "algorithms/_x.py", "from . import sft"),
        (kernel_files_say_what_they_compute, "kernels/x.py", KERNEL.replace("Source:", "From")),
        (kernel_files_say_what_they_compute, "kernels/x.py", KERNEL.replace("Traffic", "Bytes")),
        (kernel_files_say_what_they_compute, "kernels/x.py", KERNEL.replace("y = x", "y is x")),
        (kernel_files_read_in_one_order, "kernels/x.py", KERNEL.replace("- launch", "- autograd")),
        (kernel_files_read_in_one_order, "kernels/x.py", KERNEL.replace("- launch", "- backward pass")),
        (kernel_files_read_in_one_order, "kernels/x.py", KERNEL.replace("# ---- op\n", "")),
        (kernel_files_read_in_one_order, "kernels/x.py", "# ---- launch\n# ---- kernels"),
        (kernel_files_read_in_one_order, "kernels/x.py", "# ---- op\n# ---- reference"),
        (kernel_files_read_in_one_order, "kernels/x.py", "# ---- kernels\n# ---- kernels"),
        (kernel_files_read_in_one_order, "kernels/x.py", KERNEL.replace("def _forward(", "def glu_reference(")),
        (kernel_files_read_in_one_order, "kernels/x.py", KERNEL + "\n\n@triton.jit\ndef _late(N):\n    pass\n"),
        (kernel_files_read_in_one_order, "kernels/head/blocks.py", "@triton.jit\ndef _tile(N):\n    pass\n"),
        (kernel_files_read_in_one_order, "kernels/plain/x.py", "# ---- kernels\n@triton.jit\ndef _f(N): ..."),
        (what_stands_under_op_is_exported, "kernels/x.py", KERNEL.replace("def rms_norm(", "def rms_norms(")),
        (every_op_has_its_reference, "kernels/x.py", KERNEL.replace("norm_reference", "norm_truth")),
        (every_op_has_its_reference, "kernels/x.py", KERNEL.replace("norm_reference", "norms_reference")),
        (every_op_has_its_reference, "kernels/x.py", KERNEL.replace("norm(x, eps=1e-6", "norm(x, eps=1e-5")),
        (every_op_has_its_reference, "kernels/x.py", KERNEL.replace("norm(x, eps=1e-6, *, ", "norm(x, eps=1e-6, ")),
        (every_op_has_its_reference, "kernels/x.py", KERNEL.replace("memory_budget=None", "seed=None")),
        (references_use_all_they_take, "kernels/x.py", KERNEL.replace("eps * flag", "eps")),
        (no_op_hides_its_module, "kernels/head/rms_norm.py", KERNEL),
        (kernels_name_their_arguments, "kernels/x.py", KERNEL.replace("BLOCK:", "block:")),
        (kernels_name_their_arguments, "kernels/x.py", KERNEL.replace("_rms_norm_fwd", "rms_norm_fwd")),
        (algorithm_files_read_in_one_order, "algorithms/x.py", ALGORITHM.replace("Run:", "Try:")),
        (algorithm_files_read_in_one_order, "algorithms/x.py", ALGORITHM.replace("class Config", "class Settings")),
        (algorithm_files_read_in_one_order, "algorithms/x.py", _SWAPPED),
        (algorithm_files_read_in_one_order, "algorithms/x.py", ALGORITHM + "\n\ndef late():\n    pass\n"),
        (losses_require_their_denominator, "algorithms/x.py", ALGORITHM.replace("num_tokens)", "num_tokens=1)")),
        (functions_take_few_parameters, "kernels/x.py", KERNEL.replace("g, h)", "g, h, i)")),
        (functions_take_few_parameters, "kernels/x.py", KERNEL.replace("g, h)", "g, *h, i)")),
        (functions_take_few_parameters, "kernels/x.py", "class A:\n    def f(self, a, b, c, d, e, f, g, h, **i): ..."),
        (functions_take_few_parameters, "model/x.py", "def rms_norm(a, b, c, d, e, f, g, h, i): ..."),
        (functions_take_few_parameters, "model/x.py", "def generate(a, b, c, d, e, f, g, h, *, i): ..."),
        (functions_take_few_parameters, "model/generate.py", "def draw(a, b, c, d, e, f, g, h, *, i): ..."),
        (functions_take_few_parameters, "model/generate.py", "def f():\n  def stream(a, b, c, d, e, f, g, h, i): ..."),
        (functions_are_short, "kernels/x.py", _of_lines(61)),
        (functions_are_short, "kernels/x.py", _of_lines(101, "@triton.jit\ndef f():")),
        (functions_are_short, "algorithms/x.py", _of_lines(81, "def train(cfg):")),
        (functions_are_short, "kernels/x.py", _of_lines(63, "def rms_norm(x):")),
        (files_are_short, "algorithms/x.py", ALGORITHM + "\n" * MOST_LINES_OF_A_FILE),
        (files_are_short, "kernels/lora.py", "\n" * 651),
        (functions_have_paragraphs, "kernels/x.py", f"def f():\n{_STEPS}{_STEPS}"),
        (functions_have_paragraphs, "kernels/x.py", f"@triton.jit\ndef _f(N):\n{_STEPS}    y = 2  # aside\n{_STEPS}"),
        (the_formatter_is_not_fought, "kernels/x.py", "x = 1  # fmt: skip"),
        (the_formatter_is_not_fought, "kernels/x.py", "# ---- kernels\n# ---- launch\n# fmt: off"),
        (the_formatter_is_not_fought, "kernels/x.py", "# ---- kernels\n# fmt: off\n# fmt: on\n# fmt: off"),
        (the_formatter_is_not_fought, "model/x.py", "# fmt: off"),
        (the_formatter_is_not_fought, "kernels/x.py", KERNEL.replace("# fmt: on\n", "") + "# fmt: on"),
        (gradients_and_inputs_go_by_name, "kernels/x.py", "grads = (None,) * n"),
        (gradients_and_inputs_go_by_name, "kernels/x.py", "grads = dx, *[None] * 7"),
        (gradients_and_inputs_go_by_name, "kernels/x.py", "need = ctx.needs_input_grad[4]"),
        (gradients_and_inputs_go_by_name, "kernels/x.py", "a, b = inputs[:20], rest[1]"),
        (docstrings_start_with_a_phrase, "kernels/x.py", 'def f():\n    """Of x."""'),
        (docstrings_start_with_a_phrase, "kernels/x.py", 'class A:\n    """What f takes."""'),
        (docstrings_start_with_a_phrase, "bench/x.py", '"""As the table has it."""'),
    ],
)  # fmt: skip
def test_a_planted_fault_is_found(rule, name, source):
    assert list(rule(name, source))


def test_a_planted_circle_is_found():
    files = {
        "kernels/_op.py": "from . import records",
        "kernels/records.py": "from .head.blocks import block",
        "kernels/head/blocks.py": "def f():\n    from .._op import make_op",
    }
    assert set(circle(files)) == {"_op", "records", "head/blocks"}
    assert not circle(files | {"kernels/records.py": ""})


@pytest.mark.parametrize(
    "exempt",
    [
        {"kernels/away.py": ["files_are_short"]},
        {"kernels/norm.py": []},
        {"kernels/norm.py": ["files_are_long"]},
        {"kernels/norm.py": ["files_are_short"]},
    ],
    ids=["file", "empty", "rule", "kept"],
)
def test_a_line_that_exempts_nothing_is_found(exempt):
    assert list(stale(exempt, {"kernels/norm.py": KERNEL}))
