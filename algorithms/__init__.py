"""The algorithms, one per file, such as sft.py and grpo.py. Code that several algorithms share is in the subfolders."""

from .run.versions import __version__ as __version__
