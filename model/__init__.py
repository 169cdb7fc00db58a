"""One minimal transformer on the fused ops, and the files that it reads and writes.

The names below need torch alone. Import the other names from their own files: `load_model` and `save_model` from
checkpoint, `Tokenizer` from text/tokenizer, `generate` from generate.
"""

from .cache import Cache as Cache
from .config import ModelConfig as ModelConfig
from .errors import InputError as InputError
from .packed import Packed as Packed
from .packed import pack as pack
from .rope import Rope as Rope
from .transformer import Transformer as Transformer
from .vocabulary import Vocabulary as Vocabulary
