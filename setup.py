"""Packaging. The folder kernels/ at the root is imported as dqjax.kernels (README, "Layout")."""

import pathlib

from setuptools import find_packages, setup

ROOT = pathlib.Path(__file__).parent
VERSION = (ROOT / "dqjax" / "__init__.py").read_text().split('__version__ = "')[1].split('"')[0]

KERNELS = ["dqjax.kernels"] + [f"dqjax.kernels.{name}" for name in find_packages("kernels")]

REQUIRES = [
    "jax>=0.10.2,<0.13",
    "flax>=0.12",
    "optax>=0.2.8",
    "jaxtyping",
    "orbax-checkpoint>=0.12.4",
    "transformers>=5.17",
    "jinja2",  # chat templates; transformers leaves it out
    "datasets",
    "grain>=0.2.18",
    "numpy",
    "sentencepiece",
    "safetensors",
    "pydantic>=2.10",
    "pyyaml",
    "tqdm",
    "tensorboardX",
    "math-verify",
    "openai",
    "aiohttp",
    "tenacity",
]

EXTRAS = {
    "tasks": ["reasoning-gym==0.1.25"],
    "test": [
        "pytest",
        "pytest-xdist",
        "hypothesis",
        "beartype",
        "libtpu",
        "reasoning-gym==0.1.25",
        # The oracles. torch and trl must be resolved together: see launch/test.sh.
        'torch==2.13.0; python_version < "3.12"',
        'trl==1.16.0; python_version < "3.12"',
        'peft==0.21.2; python_version < "3.12"',
        # `transformers serve`, the server that the data factory is tested against.
        'fastapi; python_version < "3.12"',
        'uvicorn; python_version < "3.12"',
    ],
    "tpu": ["jax[tpu]"],
    "cuda": ["jax[cuda13]"],
    "plots": ["matplotlib"],
    "wandb": ["wandb"],
}

setup(
    name="dqjax",
    version=VERSION,
    description="Distil, reward and reinforce small reasoning models in JAX, and export them for serving.",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["dqjax", "dqjax.*"]) + KERNELS,
    package_dir={"dqjax": "dqjax", "dqjax.kernels": "kernels"},
    package_data={"dqjax.data": ["templates/*.jinja", "prompts/*.txt"], "dqjax.kernels.tuning": ["*.json"]},
    install_requires=REQUIRES,
    extras_require=EXTRAS,
)
