"""One minimal transformer on the fused ops, floor 1, and the files it reads and writes."""

from .cache import Cache as Cache
from .checkpoint import load_model as load_model
from .checkpoint import save_model as save_model
from .config import ModelConfig as ModelConfig
from .config import Rope as Rope
from .errors import InputError as InputError
from .generate import Sample as Sample
from .generate import generate as generate
from .packed import Packed as Packed
from .packed import pack as pack
from .transformer import Transformer as Transformer
