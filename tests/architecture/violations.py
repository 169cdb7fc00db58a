"""Sources that hold the rules to their word: some that a rule allows, and for each some in which it finds a fault."""

from general import (
    MOST_LINES_OF_A_FILE,
    algorithm_files_read_in_one_order,
    docstrings_start_with_a_phrase,
    files_are_short,
    floor_0_stands_on_torch_and_triton,
    functions_are_short,
    functions_have_paragraphs,
    functions_take_few_parameters,
    gradients_and_inputs_go_by_name,
    imports_point_down,
    losses_require_their_denominator,
    names_are_words,
    optional_packages_are_imported_on_demand,
    precision_is_decided_once,
    the_formatter_is_not_fought,
)
from of_kernels import (
    every_op_has_its_reference,
    kernel_files_read_in_one_order,
    kernel_files_say_what_they_compute,
    kernels_name_their_arguments,
    no_op_hides_its_module,
    references_use_all_they_take,
    what_stands_under_op_is_exported,
)
from rooms import (
    algorithms_never_import_one_another,
    files_import_in_no_circle,
    objectives_stand_on_torch,
    rooms_import_what_they_may,
)
from writing import WRITER, files_are_written_beside_their_place

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
_MERGE = '''"""Nothing is trained.

Run:    burnish merge
"""


class Config:
    pass


def merge(cfg):
    pass


if __name__ == "__main__":
    merge(Config())
'''
_IN_A_FOLDER = "with files.replacing_folder(folder) as new:\n    pass\n    (new / 'a').write_text(text)"
_STEPS = "    x = 1\n" * 8


def _of_lines(count, head="def f():"):
    """A function of that many lines, with paragraphs."""
    return f"{head}\n" + "".join("    x = 1\n" if i % 9 else "\n" for i in range(1, count))


_ALLOWED = {
    functions_take_few_parameters: [
        ("model/x.py", "class A:\n    def f(self, a, b, c, d, e, f, g, h): ..."),
    ],
    functions_are_short: [
        ("kernels/x.py", _of_lines(60)),
        ("kernels/x.py", _of_lines(100, "@triton.jit\ndef f():")),
        ("algorithms/x.py", _of_lines(80, "def train(cfg):")),
        ("kernels/x.py", _of_lines(61, "def rms_norm(\n    x,\n):")),
    ],
    files_are_short: [
        ("kernels/lora.py", "\n" * 650),
    ],
    functions_have_paragraphs: [
        ("kernels/x.py", f"def f():\n{_STEPS}    # a step\n{_STEPS}\n{_STEPS}"),
        ("kernels/x.py", "def f():\n    return [\n" + "        1,\n" * 30 + "    ]"),
    ],
    the_formatter_is_not_fought: [
        ("kernels/x.py", "x = '# fmt: skip'"),
    ],
    gradients_and_inputs_go_by_name: [
        ("kernels/x.py", "a = inputs[3], rest[-1], others[7], [0] * 4, rest[:2]"),
    ],
    names_are_words: [
        ("model/x.py", "x.held = found['said']\nf(both=1)  # a keyword of others"),
    ],
    docstrings_start_with_a_phrase: [
        ("kernels/x.py", '"""Offsets of rows, as a kernel reads them."""'),
    ],
    rooms_import_what_they_may: [
        ("kernels/head/topk.py", "from . import blocks\nfrom .._chip import TARGET"),
        ("kernels/attention.py", "from .plain.attention import f\nfrom . import tiles"),
        ("kernels/moe.py", "from .nf4 import product\nfrom .route import counts"),
        ("algorithms/x.py", "from .run.loop import Run\nfrom .search import x"),
        ("algorithms/recipes/x.py", "from .. import sft\nfrom . import page"),
        ("algorithms/__main__.py", "from .run.streams import run_program"),
        ("algorithms/data/x.py", "from ..run.loop import Run\nfrom . import rows"),
        ("algorithms/objectives/kl.py", "from .policy import k3_loss"),
        ("model/x.py", "from ..kernels import nf4\nfrom .adapters import config"),
        ("model/checkpoint.py", "from .files import folder\nfrom .text import tokenizer"),
        ("model/files/bnb.py", "from ..config import Rope\nfrom ...kernels import NF4Weight"),
        ("model/files/peft.py", "from ..adapters.config import LoraConfig"),
        ("model/text/x.py", "from ..files import text_files\nfrom .. import vocabulary"),
        ("model/embed.py", "from .embedding.attention import mask"),
        ("model/convert.py", "from . import files"),
        ("model/embedding/head.py", "from ...kernels import glu\nfrom ..errors import shown"),
    ],
    imports_point_down: [
        ("model/x.py", "importlib.import_module(name), import_module('.files', __package__)"),
    ],
    optional_packages_are_imported_on_demand: [
        ("model/x.py", "async def f():\n    import peft"),
        ("model/x.py", "def f():\n    return import_module('peft')"),
    ],
    kernel_files_read_in_one_order: [
        ("kernels/plain/norm.py", "def rms_norm_reference(x):\n    return x"),
        ("kernels/x.py", "# ---- kernels\n# ---- blocks\n# ---- op"),
    ],
    algorithms_never_import_one_another: [
        ("algorithms/recipes/x.py", "from ..sft import Config"),
        ("algorithms/x.py", "from .run import loop\nfrom ..model import generate"),
    ],
    files_import_in_no_circle: [
        ("bench/runs/conformance.py", "from burnish.bench.runs import conformance"),
        ("bench/x.py", "from .record import keep\nfrom . import y"),
    ],
    objectives_stand_on_torch: [
        ("algorithms/objectives/x.py", "import math\nfrom torch import Tensor"),
        ("algorithms/data/x.py", "import numpy"),
    ],
    algorithm_files_read_in_one_order: [
        ("algorithms/merge.py", _MERGE),
        ("algorithms/chat.py", _MERGE.replace("merge(cfg", "main(cfg")),
    ],
    files_are_written_beside_their_place: [
        ("kernels/x.py", "path.write_text(text)"),
        (WRITER, "beside.write_text(text)\nos.replace(beside, path)"),
        ("model/x.py", "name.replace('_', '-')\nreplace(cfg, seed=1)"),
        ("model/x.py", "dataclasses.replace(cfg)\ncfg.body.replace(x, seed=1)"),
        ("model/x.py", "open(file), open(file, 'rb'), path.open(), path.open('rb')"),
        ("model/x.py", "open(os.devnull, 'w'), Path('/proc/x').write_text('5')"),
        ("model/x.py", "write_text(path, text), replacing.write_text(path, text)"),
        ("model/x.py", "cache.open(packed, rows), open(1, mode, closefd=False)"),
        ("bench/x.py", "with replacing(file) as new:\n    new.write_text(text)"),
        ("model/x.py", "with replacing(a) as new:\n    save_file(x, new / 'b')"),
        ("model/x.py", "loop.save(state), processes.copy(x), copy.copy(y)"),
        ("bench/x.py", "with replacing(a) as new, open(new, 'w') as out: ..."),
        ("bench/x.py", _IN_A_FOLDER),
        ("algorithms/run/loop.py", "open(metrics, 'a')"),
    ],
}
_FORBIDDEN = {
    imports_point_down: [
        ("kernels/x.py", "from ..model.packed import Packed"),
        ("kernels/head/x.py", "from ...model.packed import Packed"),
        ("model/x.py", "def f():\n    from burnish.bench import registry"),
        ("algorithms/x.py", "import burnish.bench.cases.registry"),
        ("model/x.py", "from .. import algorithms"),
        ("model/x.py", "importlib.import_module('burnish.algorithms.sft')"),
        ("model/files/x.py", "import_module('...bench.case', __package__)"),
        ("model/x.py", "__import__('burnish.algorithms')"),
    ],
    floor_0_stands_on_torch_and_triton: [
        ("kernels/x.py", "import numpy as np"),
        ("kernels/x.py", "numpy = importlib.import_module('numpy')"),
        ("kernels/plain/x.py", "from numpy import array"),
    ],
    optional_packages_are_imported_on_demand: [
        ("model/x.py", "if True:\n    from transformers import Trainer"),
        ("bench/x.py", "def f():\n    pass\nimport trl.trainer"),
        ("model/x.py", "peft = importlib.import_module('peft')"),
    ],
    precision_is_decided_once: [
        ("kernels/x.py", "tf32 = torch.backends.cuda.matmul.allow_tf32"),
        ("model/x.py", "from torch import is_autocast_enabled as enabled"),
        ("bench/x.py", "getattr(torch, 'get_autocast_dtype')('cpu')"),
        ("bench/x.py", "torch.backends.fp32_precision = 'tf32'"),
    ],
    rooms_import_what_they_may: [
        ("kernels/rope.py", "from .norm import rms_norm"),
        ("kernels/rope.py", "from . import norm"),
        ("kernels/rope.py", "from burnish.kernels.norm import rms_norm"),
        ("kernels/rope.py", "from burnish.kernels import _chip"),
        ("kernels/rope.py", "from . import rms_norm"),
        ("kernels/rope.py", "from .head.blocks import scaled_logits"),
        ("kernels/head/topk.py", "from .divergence import token_divergence"),
        ("kernels/head/blocks.py", "from ..norm import rms_norm"),
        ("kernels/plain/moe.py", "from ..moe import moe_mlp"),
        ("kernels/records.py", "from .plain.moe import Activation"),
        ("kernels/tiles.py", "from .nf4 import product"),
        ("algorithms/x.py", "from .sft import sft_loss"),
        ("algorithms/run/x.py", "import_module('burnish.algorithms.data.rows')"),
        ("algorithms/run/x.py", "from .. import data"),
        ("model/transformer.py", "from . import files"),
        ("model/__init__.py", "from . import text"),
        ("algorithms/x.py", "from .recipes import parts"),
        ("algorithms/x.py", "from burnish.algorithms.run.loop import Run"),
        ("algorithms/__main__.py", "from . import sft"),
        ("algorithms/__main__.py", "from .run.loop import Run"),
        ("algorithms/run/x.py", "from ..data.rows import read_rows"),
        ("algorithms/run/x.py", "def f():\n    from ..objectives import policy"),
        ("algorithms/data/x.py", "from ..objectives.policy import clipped_loss"),
        ("algorithms/data/x.py", "from ..search import refine"),
        ("algorithms/data/x.py", "from ..verifiers import number"),
        ("algorithms/search/x.py", "from .. import evaluate"),
        ("algorithms/objectives/x.py", "from ..run.processes import rank"),
        ("algorithms/objectives/x.py", "from ...model import Packed"),
        ("algorithms/objectives/x.py", "from ...kernels import token_logprobs"),
        ("model/transformer.py", "if TYPE_CHECKING:\n    from .files.dtypes import Dtypes"),
        ("model/generate.py", "from .text.token_ids import read_stop_ids"),
        ("model/generate.py", "from .checkpoint import load_model"),
        ("model/x.py", "from .embedding import head"),
        ("model/x.py", "from burnish.kernels import rms_norm"),
        ("model/__init__.py", "from .files.folder import replacing"),
        ("model/embed.py", "from .transformer import Transformer"),
        ("model/embed.py", "from ..kernels import rms_norm"),
        ("model/files/x.py", "from ..linear import LoraConfig"),
        ("model/files/x.py", "from ..text.token_ids import read_stop_ids"),
        ("model/files/x.py", "from ...kernels import NF4Weight"),
        ("model/text/x.py", "from ..config import ModelConfig"),
        ("model/adapters/x.py", "from ..linear import Linear"),
        ("model/embedding/x.py", "from ..transformer import Transformer"),
    ],
    algorithms_never_import_one_another: [
        ("algorithms/x.py", "from .sft import sft_loss"),
        ("algorithms/_x.py", "from . import sft"),
        ("algorithms/run/x.py", "from .. import sft"),
        ("algorithms/evaluate.py", "from .grpo import Config"),
    ],
    files_import_in_no_circle: [
        ("model/errors.py", "from .files.text_files import read_text"),
        ("model/errors.py", "def f():\n    from .files import text_files"),
        ("kernels/_chip.py", "from . import rms_norm"),
    ],
    objectives_stand_on_torch: [
        ("algorithms/objectives/x.py", "import numpy as np"),
        ("algorithms/objectives/x.py", "def f():\n    import triton"),
    ],
    kernel_files_say_what_they_compute: [
        ("kernels/x.py", KERNEL.replace("Source:", "From")),
        ("kernels/x.py", KERNEL.replace("Traffic", "Bytes")),
        ("kernels/x.py", KERNEL.replace("y = x", "y is x")),
    ],
    kernel_files_read_in_one_order: [
        ("kernels/x.py", KERNEL.replace("- launch", "- autograd")),
        ("kernels/x.py", KERNEL.replace("- launch", "- backward pass")),
        ("kernels/x.py", KERNEL.replace("# ---- op\n", "")),
        ("kernels/x.py", "# ---- launch\n# ---- kernels"),
        ("kernels/x.py", "# ---- op\n# ---- reference"),
        ("kernels/x.py", "# ---- kernels\n# ---- kernels"),
        ("kernels/x.py", KERNEL.replace("def _forward(", "def glu_reference(")),
        ("kernels/x.py", KERNEL + "\n\n@triton.jit\ndef _late(N):\n    pass\n"),
        ("kernels/head/blocks.py", "@triton.jit\ndef _tile(N):\n    pass\n"),
        ("kernels/plain/x.py", "# ---- kernels\n@triton.jit\ndef _f(N): ..."),
    ],
    what_stands_under_op_is_exported: [
        ("kernels/x.py", KERNEL.replace("def rms_norm(", "def rms_norms(")),
    ],
    every_op_has_its_reference: [
        ("kernels/x.py", KERNEL.replace("norm_reference", "norm_truth")),
        ("kernels/x.py", KERNEL.replace("norm_reference", "norms_reference")),
        ("kernels/x.py", KERNEL.replace("norm(x, eps=1e-6", "norm(x, eps=1e-5")),
        ("kernels/x.py", KERNEL.replace("norm(x, eps=1e-6, *, ", "norm(x, eps=1e-6, ")),
        ("kernels/x.py", KERNEL.replace("memory_budget=None", "seed=None")),
    ],
    references_use_all_they_take: [
        ("kernels/x.py", KERNEL.replace("eps * flag", "eps")),
    ],
    no_op_hides_its_module: [
        ("kernels/head/rms_norm.py", KERNEL),
    ],
    kernels_name_their_arguments: [
        ("kernels/x.py", KERNEL.replace("BLOCK:", "block:")),
        ("kernels/x.py", KERNEL.replace("_rms_norm_fwd", "rms_norm_fwd")),
    ],
    algorithm_files_read_in_one_order: [
        ("algorithms/x.py", ALGORITHM.replace("Run:", "Try:")),
        ("algorithms/x.py", ALGORITHM.replace("class Config", "class Settings")),
        ("algorithms/x.py", _SWAPPED),
        ("algorithms/x.py", ALGORITHM + "\n\ndef late():\n    pass\n"),
        ("algorithms/merge.py", _MERGE.replace("Run:", "Try:")),
        ("algorithms/merge.py", _MERGE.replace("def merge", "def fold")),
    ],
    losses_require_their_denominator: [
        ("algorithms/x.py", "async def x_loss(logprob): ..."),
        ("algorithms/x.py", ALGORITHM.replace("num_tokens)", "num_tokens=1)")),
    ],
    functions_take_few_parameters: [
        ("kernels/x.py", KERNEL.replace("g, h)", "g, h, i)")),
        ("kernels/x.py", KERNEL.replace("g, h)", "g, *h, i)")),
        ("kernels/x.py", "class A:\n    def f(self, a, b, c, d, e, f, g, h, **i): ..."),
        ("model/x.py", "def rms_norm(a, b, c, d, e, f, g, h, i): ..."),
        ("model/x.py", "def generate(a, b, c, d, e, f, g, h, *, i): ..."),
        ("model/x.py", "def f():\n  def stream(a, b, c, d, e, f, g, h, i): ..."),
        ("model/x.py", "async def f(a, b, c, d, e, f, g, h, i): ..."),
        ("tests/model/test_x.py", "def test_f(a, b, c, d, e, f, g, h, tmp_path): ..."),
    ],
    functions_are_short: [
        ("kernels/x.py", _of_lines(61)),
        ("kernels/x.py", _of_lines(61, "async def f():")),
        ("kernels/x.py", _of_lines(101, "@triton.jit\ndef f():")),
        ("algorithms/x.py", _of_lines(81, "def train(cfg):")),
        ("kernels/x.py", _of_lines(63, "def rms_norm(x):")),
        ("tests/model/test_x.py", _of_lines(61, "def test_f():")),
    ],
    files_are_short: [
        ("algorithms/x.py", ALGORITHM + "\n" * MOST_LINES_OF_A_FILE),
        ("kernels/lora.py", "\n" * 651),
        ("tests/kernels/test_lora.py", "\n" * 451),
    ],
    functions_have_paragraphs: [
        ("kernels/x.py", f"def f():\n{_STEPS}{_STEPS}"),
        ("kernels/x.py", f"@triton.jit\ndef _f(N):\n{_STEPS}    y = 2  # aside\n{_STEPS}"),
        ("kernels/x.py", f"async def f():\n{_STEPS}{_STEPS}"),
        ("tests/model/test_x.py", f"def test_f():\n{_STEPS}{_STEPS}"),
    ],
    the_formatter_is_not_fought: [
        ("kernels/x.py", "x = 1  # fmt: skip"),
        ("kernels/x.py", "# ---- kernels\n# ---- launch\n# fmt: off"),
        ("kernels/x.py", "# ---- kernels\n# fmt: off\n# fmt: on\n# fmt: off"),
        ("model/x.py", "# fmt: off"),
        ("kernels/x.py", KERNEL.replace("# fmt: on\n", "") + "# fmt: on"),
        ("tests/model/test_x.py", "CASES = [1]  # fmt: skip"),
        ("tests/kernels/test_x.py", "# ---- kernels\n# fmt: off"),
    ],
    gradients_and_inputs_go_by_name: [
        ("kernels/x.py", "grads = (None,) * n"),
        ("kernels/x.py", "grads = dx, *[None] * 7"),
        ("kernels/x.py", "need = ctx.needs_input_grad[4]"),
        ("kernels/x.py", "a, b = inputs[:20], rest[1]"),
        ("tests/model/test_x.py", "tensors = [None] * 3"),
    ],
    names_are_words: [
        ("kernels/x.py", "for i, (held, *rest) in x: ..."),
        ("model/x.py", "f = lambda *both: both"),
        ("algorithms/x.py", "async def told(): ..."),
        ("bench/x.py", "import numpy as mine"),
        ("tests/model/test_x.py", "class A(NamedTuple):\n    further: int"),
    ],
    docstrings_start_with_a_phrase: [
        ("kernels/x.py", 'def f():\n    """Of x."""'),
        ("kernels/x.py", 'class A:\n    """What f takes."""'),
        ("bench/x.py", 'async def f():\n    """Of x."""'),
        ("bench/x.py", '"""As the table has it."""'),
        ("tests/model/test_x.py", 'def test_f():\n    """Where x is empty."""'),
    ],
    files_are_written_beside_their_place: [
        ("model/x.py", "beside.replace(path)"),
        ("model/x.py", "os.replace(beside, path)"),
        ("model/x.py", "def f():\n    from os import rename"),
        ("model/x.py", "os.rename(beside, path)"),
        ("model/x.py", "beside.rename(path)"),
        ("model/x.py", "shutil.move(beside, path)"),
        ("algorithms/x.py", "(folder / 'a.json').write_text(text, encoding='utf-8')"),
        ("algorithms/x.py", "path.write_bytes(b'')"),
        ("bench/x.py", "with open(file, 'w') as out: ..."),
        ("bench/x.py", "open(file, mode='xb')"),
        ("bench/x.py", "open(file, mode)"),
        ("bench/x.py", "path.open('wb'), gzip.open(path, 'rt')"),
        ("bench/x.py", "gzip.open(path, 'wt')"),
        ("bench/x.py", "os.open(path, os.O_WRONLY | os.O_CREAT)"),
        ("bench/x.py", "torch.save(state, path), np.save(path, x)"),
        ("bench/x.py", "shutil.copy(source, path)"),
        ("model/x.py", "with replacing(a) as new:\n    save_file(tensors, a)"),
        ("bench/x.py", _IN_A_FOLDER.replace("new /", "folder /")),
        ("bench/x.py", _IN_A_FOLDER.replace("    (", "(")),
        ("bench/x.py", _IN_A_FOLDER.replace("replacing_folder", "opened")),
        ("bench/x.py", "with replacing(file) as new:\n    new.replace(file)"),
        ("bench/x.py", "with replacing(file) as new:\n    file.write_bytes(new)"),
        ("algorithms/sft.py", "open(metrics, 'a')"),
        ("algorithms/run/loop.py", "open(metrics, 'w')"),
    ],
}


# (rule, name, source)
ALLOWED = [(rule, *planted) for rule, sources in _ALLOWED.items() for planted in sources]
FORBIDDEN = [(rule, *planted) for rule, sources in _FORBIDDEN.items() for planted in sources]
