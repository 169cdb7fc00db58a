"""What the rules are held to: for each a source that it allows, and one in which it must find a fault."""

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


ALLOWED = [
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
    (rooms_import_what_they_may, "algorithms/x.py", "from .run.loop import Run\nfrom .search import x"),
    (rooms_import_what_they_may, "algorithms/recipes/x.py", "from .. import sft\nfrom . import page"),
    (rooms_import_what_they_may, "algorithms/__main__.py", "from .run.streams import run_program"),
    (rooms_import_what_they_may, "algorithms/data/x.py", "from ..run.loop import Run\nfrom . import rows"),
    (rooms_import_what_they_may, "algorithms/objectives/kl.py", "from .policy import k3_loss"),
    (rooms_import_what_they_may, "model/x.py", "from ..kernels import nf4\nfrom .adapters import config"),
    (rooms_import_what_they_may, "model/checkpoint.py", "from .files import folder\nfrom .text import tokenizer"),
    (rooms_import_what_they_may, "model/files/bnb.py", "from ..config import Rope\nfrom ...kernels import NF4Weight"),
    (rooms_import_what_they_may, "model/files/peft.py", "from ..adapters.config import LoraConfig"),
    (rooms_import_what_they_may, "model/text/x.py", "from ..files import text_files\nfrom .. import vocabulary"),
    (rooms_import_what_they_may, "model/embed.py", "from .embedding.attention import mask"),
    (rooms_import_what_they_may, "model/convert.py", "from . import files"),
    (imports_point_down, "model/x.py", "importlib.import_module(name), import_module('.files', __package__)"),
    (optional_packages_are_imported_on_demand, "model/x.py", "async def f():\n    import peft"),
    (optional_packages_are_imported_on_demand, "model/x.py", "def f():\n    return import_module('peft')"),
    (rooms_import_what_they_may, "model/embedding/head.py", "from ...kernels import glu\nfrom ..errors import shown"),
    (kernel_files_read_in_one_order, "kernels/plain/norm.py", "def rms_norm_reference(x):\n    return x"),
    (kernel_files_read_in_one_order, "kernels/x.py", "# ---- kernels\n# ---- blocks\n# ---- op"),
    (algorithms_never_import_one_another, "algorithms/recipes/x.py", "from ..sft import Config"),
    (algorithms_never_import_one_another, "algorithms/x.py", "from .run import loop\nfrom ..model import generate"),
    (files_import_in_no_circle, "bench/runs/conformance.py", "from burnish.bench.runs import conformance"),
    (files_import_in_no_circle, "bench/x.py", "from .record import keep\nfrom . import y"),
    (objectives_stand_on_torch, "algorithms/objectives/x.py", "import math\nfrom torch import Tensor"),
    (objectives_stand_on_torch, "algorithms/data/x.py", "import numpy"),
    (algorithm_files_read_in_one_order, "algorithms/merge.py", _MERGE),
    (algorithm_files_read_in_one_order, "algorithms/chat.py", _MERGE.replace("merge(cfg", "main(cfg")),
    (files_are_written_beside_their_place, "kernels/x.py", "path.write_text(text)"),
    (files_are_written_beside_their_place, WRITER, "beside.write_text(text)\nos.replace(beside, path)"),
    (files_are_written_beside_their_place, "model/x.py", "name.replace('_', '-')\nreplace(cfg, seed=1)"),
    (files_are_written_beside_their_place, "model/x.py", "dataclasses.replace(cfg)\ncfg.body.replace(x, seed=1)"),
    (files_are_written_beside_their_place, "model/x.py", "open(file), open(file, 'rb'), path.open(), path.open('rb')"),
    (files_are_written_beside_their_place, "model/x.py", "open(os.devnull, 'w'), Path('/proc/x').write_text('5')"),
    (files_are_written_beside_their_place, "model/x.py", "write_text(path, text), replacing.write_text(path, text)"),
    (files_are_written_beside_their_place, "model/x.py", "cache.open(packed, rows), open(1, mode, closefd=False)"),
    (files_are_written_beside_their_place, "bench/x.py", "with replacing(file) as new:\n    new.write_text(text)"),
    (files_are_written_beside_their_place, "model/x.py", "with replacing(a) as new:\n    save_file(x, new / 'b')"),
    (files_are_written_beside_their_place, "model/x.py", "loop.save(state), processes.copy(x), copy.copy(y)"),
    (files_are_written_beside_their_place, "bench/x.py", "with replacing(a) as new, open(new, 'w') as out: ..."),
    (files_are_written_beside_their_place, "bench/x.py", _IN_A_FOLDER),
    (files_are_written_beside_their_place, "algorithms/run/loop.py", "open(metrics, 'a')"),
]  # fmt: skip
FORBIDDEN = [
    (imports_point_down, "kernels/x.py", "from ..model.packed import Packed"),
    (imports_point_down, "kernels/head/x.py", "from ...model.packed import Packed"),
    (imports_point_down, "model/x.py", "def f():\n    from burnish.bench import registry"),
    (imports_point_down, "algorithms/x.py", "import burnish.bench.cases.registry"),
    (imports_point_down, "model/x.py", "from .. import algorithms"),
    (imports_point_down, "model/x.py", "importlib.import_module('burnish.algorithms.sft')"),
    (imports_point_down, "model/files/x.py", "import_module('...bench.case', __package__)"),
    (imports_point_down, "model/x.py", "__import__('burnish.algorithms')"),
    (floor_0_stands_on_torch_and_triton, "kernels/x.py", "import numpy as np"),
    (floor_0_stands_on_torch_and_triton, "kernels/x.py", "numpy = importlib.import_module('numpy')"),
    (floor_0_stands_on_torch_and_triton, "kernels/plain/x.py", "from numpy import array"),
    (optional_packages_are_imported_on_demand, "model/x.py", "if True:\n    from transformers import Trainer"),
    (optional_packages_are_imported_on_demand, "bench/x.py", "def f():\n    pass\nimport trl.trainer"),
    (optional_packages_are_imported_on_demand, "model/x.py", "peft = importlib.import_module('peft')"),
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
    (rooms_import_what_they_may, "algorithms/x.py", "from .sft import sft_loss"),
    (rooms_import_what_they_may, "algorithms/run/x.py", "import_module('burnish.algorithms.data.rows')"),
    (rooms_import_what_they_may, "algorithms/run/x.py", "from .. import data"),
    (rooms_import_what_they_may, "model/transformer.py", "from . import files"),
    (rooms_import_what_they_may, "model/__init__.py", "from . import text"),
    (rooms_import_what_they_may, "algorithms/x.py", "from .recipes import parts"),
    (rooms_import_what_they_may, "algorithms/x.py", "from burnish.algorithms.run.loop import Run"),
    (rooms_import_what_they_may, "algorithms/__main__.py", "from . import sft"),
    (rooms_import_what_they_may, "algorithms/__main__.py", "from .run.loop import Run"),
    (rooms_import_what_they_may, "algorithms/run/x.py", "from ..data.rows import read_rows"),
    (rooms_import_what_they_may, "algorithms/run/x.py", "def f():\n    from ..objectives import policy"),
    (rooms_import_what_they_may, "algorithms/data/x.py", "from ..objectives.policy import clipped_loss"),
    (rooms_import_what_they_may, "algorithms/data/x.py", "from ..search import refine"),
    (rooms_import_what_they_may, "algorithms/data/x.py", "from ..verifiers import number"),
    (rooms_import_what_they_may, "algorithms/search/x.py", "from .. import evaluate"),
    (rooms_import_what_they_may, "algorithms/objectives/x.py", "from ..run.processes import rank"),
    (rooms_import_what_they_may, "algorithms/objectives/x.py", "from ...model import Packed"),
    (rooms_import_what_they_may, "algorithms/objectives/x.py", "from ...kernels import token_logprobs"),
    (rooms_import_what_they_may, "model/transformer.py", "if TYPE_CHECKING:\n    from .files.dtypes import Dtypes"),
    (rooms_import_what_they_may, "model/generate.py", "from .text.token_ids import read_stop_ids"),
    (rooms_import_what_they_may, "model/generate.py", "from .checkpoint import load_model"),
    (rooms_import_what_they_may, "model/x.py", "from .embedding import head"),
    (rooms_import_what_they_may, "model/x.py", "from burnish.kernels import rms_norm"),
    (rooms_import_what_they_may, "model/__init__.py", "from .files.folder import replacing"),
    (rooms_import_what_they_may, "model/embed.py", "from .transformer import Transformer"),
    (rooms_import_what_they_may, "model/embed.py", "from ..kernels import rms_norm"),
    (rooms_import_what_they_may, "model/files/x.py", "from ..linear import LoraConfig"),
    (rooms_import_what_they_may, "model/files/x.py", "from ..text.token_ids import read_stop_ids"),
    (rooms_import_what_they_may, "model/files/x.py", "from ...kernels import NF4Weight"),
    (rooms_import_what_they_may, "model/text/x.py", "from ..config import ModelConfig"),
    (rooms_import_what_they_may, "model/adapters/x.py", "from ..linear import Linear"),
    (rooms_import_what_they_may, "model/embedding/x.py", "from ..transformer import Transformer"),
    (algorithms_never_import_one_another, "algorithms/x.py", "from .sft import sft_loss"),
    (algorithms_never_import_one_another, "algorithms/_x.py", "from . import sft"),
    (algorithms_never_import_one_another, "algorithms/run/x.py", "from .. import sft"),
    (algorithms_never_import_one_another, "algorithms/evaluate.py", "from .grpo import Config"),
    (files_import_in_no_circle, "model/errors.py", "from .files.text_files import read_text"),
    (files_import_in_no_circle, "model/errors.py", "def f():\n    from .files import text_files"),
    (files_import_in_no_circle, "kernels/_chip.py", "from . import rms_norm"),
    (objectives_stand_on_torch, "algorithms/objectives/x.py", "import numpy as np"),
    (objectives_stand_on_torch, "algorithms/objectives/x.py", "def f():\n    import triton"),
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
    (losses_require_their_denominator, "algorithms/x.py", "async def x_loss(logprob): ..."),
    (losses_require_their_denominator, "algorithms/x.py", ALGORITHM.replace("num_tokens)", "num_tokens=1)")),
    (functions_take_few_parameters, "kernels/x.py", KERNEL.replace("g, h)", "g, h, i)")),
    (functions_take_few_parameters, "kernels/x.py", KERNEL.replace("g, h)", "g, *h, i)")),
    (functions_take_few_parameters, "kernels/x.py", "class A:\n    def f(self, a, b, c, d, e, f, g, h, **i): ..."),
    (functions_take_few_parameters, "model/x.py", "def rms_norm(a, b, c, d, e, f, g, h, i): ..."),
    (functions_take_few_parameters, "model/x.py", "def generate(a, b, c, d, e, f, g, h, *, i): ..."),
    (functions_take_few_parameters, "model/generate.py", "def draw(a, b, c, d, e, f, g, h, *, i): ..."),
    (functions_take_few_parameters, "model/generate.py", "def f():\n  def stream(a, b, c, d, e, f, g, h, i): ..."),
    (functions_take_few_parameters, "model/x.py", "async def f(a, b, c, d, e, f, g, h, i): ..."),
    (functions_are_short, "kernels/x.py", _of_lines(61)),
    (functions_are_short, "kernels/x.py", _of_lines(61, "async def f():")),
    (functions_are_short, "kernels/x.py", _of_lines(101, "@triton.jit\ndef f():")),
    (functions_are_short, "algorithms/x.py", _of_lines(81, "def train(cfg):")),
    (functions_are_short, "kernels/x.py", _of_lines(63, "def rms_norm(x):")),
    (files_are_short, "algorithms/x.py", ALGORITHM + "\n" * MOST_LINES_OF_A_FILE),
    (files_are_short, "kernels/lora.py", "\n" * 651),
    (functions_have_paragraphs, "kernels/x.py", f"def f():\n{_STEPS}{_STEPS}"),
    (functions_have_paragraphs, "kernels/x.py", f"@triton.jit\ndef _f(N):\n{_STEPS}    y = 2  # aside\n{_STEPS}"),
    (functions_have_paragraphs, "kernels/x.py", f"async def f():\n{_STEPS}{_STEPS}"),
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
    (docstrings_start_with_a_phrase, "bench/x.py", 'async def f():\n    """Of x."""'),
    (docstrings_start_with_a_phrase, "bench/x.py", '"""As the table has it."""'),
    (algorithm_files_read_in_one_order, "algorithms/merge.py", _MERGE.replace("Run:", "Try:")),
    (algorithm_files_read_in_one_order, "algorithms/merge.py", _MERGE.replace("def merge", "def fold")),
    (files_are_written_beside_their_place, "model/x.py", "beside.replace(path)"),
    (files_are_written_beside_their_place, "model/x.py", "os.replace(beside, path)"),
    (files_are_written_beside_their_place, "model/x.py", "def f():\n    from os import rename"),
    (files_are_written_beside_their_place, "model/x.py", "os.rename(beside, path)"),
    (files_are_written_beside_their_place, "model/x.py", "beside.rename(path)"),
    (files_are_written_beside_their_place, "model/x.py", "shutil.move(beside, path)"),
    (files_are_written_beside_their_place, "algorithms/x.py", "(folder / 'a.json').write_text(text, encoding='utf-8')"),
    (files_are_written_beside_their_place, "algorithms/x.py", "path.write_bytes(b'')"),
    (files_are_written_beside_their_place, "bench/x.py", "with open(file, 'w') as out: ..."),
    (files_are_written_beside_their_place, "bench/x.py", "open(file, mode='xb')"),
    (files_are_written_beside_their_place, "bench/x.py", "open(file, mode)"),
    (files_are_written_beside_their_place, "bench/x.py", "path.open('wb'), gzip.open(path, 'rt')"),
    (files_are_written_beside_their_place, "bench/x.py", "gzip.open(path, 'wt')"),
    (files_are_written_beside_their_place, "bench/x.py", "os.open(path, os.O_WRONLY | os.O_CREAT)"),
    (files_are_written_beside_their_place, "bench/x.py", "torch.save(state, path), np.save(path, x)"),
    (files_are_written_beside_their_place, "bench/x.py", "shutil.copy(source, path)"),
    (files_are_written_beside_their_place, "model/x.py", "with replacing(a) as new:\n    save_file(tensors, a)"),
    (files_are_written_beside_their_place, "bench/x.py", _IN_A_FOLDER.replace("new /", "folder /")),
    (files_are_written_beside_their_place, "bench/x.py", _IN_A_FOLDER.replace("    (", "(")),
    (files_are_written_beside_their_place, "bench/x.py", _IN_A_FOLDER.replace("replacing_folder", "opened")),
    (files_are_written_beside_their_place, "bench/x.py", "with replacing(file) as new:\n    new.replace(file)"),
    (files_are_written_beside_their_place, "bench/x.py", "with replacing(file) as new:\n    file.write_bytes(new)"),
    (files_are_written_beside_their_place, "algorithms/sft.py", "open(metrics, 'a')"),
    (files_are_written_beside_their_place, "algorithms/run/loop.py", "open(metrics, 'w')"),
]  # fmt: skip
