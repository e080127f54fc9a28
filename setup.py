# SPDX-License-Identifier: Apache-2.0
"""Packaging; the settings of tools (ruff, pytest) live in pyproject.toml."""

import pathlib

from setuptools import find_packages, setup

# Lower bounds are the versions that the test suite was run against.
REQUIRES = [
    "jax>=0.10.2,<0.12",
    "flax>=0.12.8",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12.8",
    "grain>=0.2.18",
    "ml-collections>=1.1.0",
    "tensorflow-datasets>=4.9.10",
    "importlib_resources>=6.4",  # imported by tensorflow-datasets without being declared by it
    "array_record>=0.8.1",
    "chex>=0.1.92",
    "jaxtyping>=0.3.11",
    "einops>=0.8.2",
    "safetensors>=0.8.0",
    "etils[epath]>=1.14",
    "rich>=15.0",
    "matplotlib>=3.11",
    "tabulate>=0.10",
    "tensorboardX>=2.6.5",
    "scikit-learn>=1.9",
    "bayesian-optimization>=3.4",
    "pillow>=12.0",
]

EXTRAS = {
    "subword": ["tokenizers>=0.23"],
    "test": [
        "tokenizers>=0.23",
        # Compiles kernels for TPUs on machines that have none.
        "libtpu>=0.0.51; sys_platform == 'linux' and platform_machine == 'x86_64'",
        "pytest>=9.0",
        "pytest-timeout>=2.4",
        "pytest-xdist>=3.8",
        "hypothesis>=6.150",
        "ruff>=0.15",
        "nbclient>=0.11",
        "nbformat>=5.10",
        "ipykernel>=7.0",
    ],
    "notebooks": ["jupyterlab>=4.4", "ipykernel>=7.0"],
    "gpu": ["jax[cuda13]>=0.10.2,<0.12"],
    "tpu": ["jax[tpu]>=0.10.2,<0.12"],
}

PACKAGES = ["pallas_kernels", "adaptive", "layers", "experiments", "configs"]

setup(
    name="adaptive-transformers",
    version="0.1.0",
    description="Adaptive-compute transformers in JAX: tokens merged, bytes deleted, speedups realised under jit.",
    long_description=pathlib.Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.14",
    packages=find_packages(include=[p for name in PACKAGES for p in (name, f"{name}.*")]),
    package_data={"experiments.data": ["books/*"]},
    install_requires=REQUIRES,
    extras_require=EXTRAS,
    classifiers=[
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
