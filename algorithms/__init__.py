"""The algorithms, one per file, such as sft.py and grpo.py. Code that several algorithms share is in the subfolders."""

from .show.versions import __version__ as __version__
