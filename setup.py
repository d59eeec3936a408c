"""Packaging: `hrf_kernels` lives in kernels/, which has no __init__.py so that it never hides the hub's `kernels`."""

from pathlib import Path

from setuptools import find_packages, setup

VERSION: dict[str, str] = {}
exec(Path("hrf_fast/version.py").read_text(), VERSION)

EXTRAS = {
    "writers": ["tensorboard", "wandb"],
    # FID and KID of hrf evaluate
    "metrics": ["torchmetrics"],
    # the reward hps
    "hps": ["open_clip_torch>=2.24"],
    # completes commands and options in a shell
    "completion": ["argcomplete"],
    # where a CUDA GPU is: fused kernels, sharding, 8-bit optimizers, attention
    "gpu": ["triton>=3.4", "deepspeed>=0.19.8", "bitsandbytes>=0.44", "xformers"],
    "test": [
        # sharding is tested on CPU ranks; its sdist needs no torch to build
        "deepspeed>=0.19.8",
        "accelerate>=1.0",
        "argcomplete",
        # its compiler and interpreter test the kernels without a GPU
        "triton>=3.4; platform_system == 'Linux'",
        "tensorboard",
        "torchmetrics",
        "vendi-score",
        "pytest",
        # builds the wheel that a test installs
        "setuptools>=77",
        "pytest-cov",
        "pytest-timeout",
        "pytest-xdist",
        "ruff",
        "mypy",
        "types-PyYAML",
    ],
    # drawing portraits and peeps again, and text encoders; Fashion-MNIST comes from Debian's dataset-fashion-mnist
    "pretraining": ["dicebear-core", "dicebear-styles", "resvg-py", "transformers>=5.4"],
}

setup(
    name="hrf_fast",
    version=VERSION["__version__"],
    description="Hierarchical Reward Fine-tuning of diffusion models",
    long_description=Path("README.md").read_text() if Path("README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=[*find_packages(include=["hrf_fast*"]), *find_packages("kernels")],
    package_dir={"hrf_kernels": "kernels/hrf_kernels"},
    package_data={"hrf_fast.assets": ["**/*"], "hrf_fast.report": ["*.j2"]},
    install_requires=[
        # the first whose triton has the knobs that launches read
        "torch>=2.8",
        "numpy",
        # Student's t of studies
        "scipy",
        # pipelines of older ones don't import beside transformers 5; parts.py has the floor too
        "diffusers>=0.36",
        # text encoders, and networks that look at images; 5.4 has image processors that need no torchvision
        "transformers>=5.4",
        # older ones don't import beside transformers 5
        "peft>=0.18",
        "safetensors",
        "huggingface_hub",
        "omegaconf>=2.3",
        "pyyaml",
        "pillow",
        "tqdm",
        "matplotlib",
        "jinja2",
        "filelock",
        # free memory and usable processors
        "psutil",
    ],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["hrf=hrf_fast.cli:main"]},
)
