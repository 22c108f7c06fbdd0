"""Install accent_plugin."""

from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
version = next(
    line.split('"')[1]
    for line in (here / "accent_plugin/__init__.py").read_text(encoding="utf-8").splitlines()
    if line.startswith("__version__")
)

setup(
    name="accent_plugin",
    version=version,
    description="A SpeechBrain plugin and recipe that fine-tunes wav2vec 2.0 to classify English accents",
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    packages=find_packages(include=["accent_plugin", "accent_plugin.*"]),
    package_data={"accent_plugin": ["data/mappings/*.yaml"]},
    python_requires=">=3.11,<3.14",
    entry_points={"console_scripts": ["accent-plugin=accent_plugin.cli.main:main"]},
    install_requires=[
        "torch>=2.6",
        "torchaudio>=2.6",
        "speechbrain>=1.1.0,<1.2",
        "transformers>=5.4.0,<6",
        "huggingface_hub",
        "packaging",
        # Older ones let a forked child keep a lock.
        "filelock>=4.1",
        "safetensors",
        "hyperpyyaml>=1.2.3",
        "pyyaml",
        "jinja2>=3",
        "markupsafe",
        "datasets>=4.0.0,<6",
        "pyarrow",
        "numpy>=2.0",
        "scipy",
        "scikit-learn>=1.6",
        "soundfile>=0.13",
        "soxr>=0.5",
        "matplotlib>=3.9",
        "tqdm",
        "shtab",
        # A bundle contains a graph, which onnx writes and ONNX Runtime runs.
        "onnx>=1.18",
        "onnxruntime>=1.22",
    ],
    extras_require={
        # GPL-3.0: needed only to make the built-in synthetic corpus, loaded with ctypes, never bundled.
        "synthetic": ["espeakng-loader>=0.2.4"],
        # The page and the HTTP API. Gradio brings FastAPI and uvicorn.
        "serve": ["gradio>=6,<7", "fastapi", "starlette", "pydantic", "uvicorn", "python-multipart"],
        # MP4, M4A, WebM, AMR, WMA and others. PyAV is BSD-3-Clause; its wheels bring FFmpeg (LGPL-3.0 or later) and
        # codecs, of which x264 and x265 are GPL-2.0. Never bundled.
        "media": ["av>=14"],
        "tensorboard": ["tensorboard"],
        # Transformers 5 refuses older ones.
        "lora": ["peft>=0.20"],
        "test": [
            "pytest>=8",
            "pytest-timeout",
            "pytest-xdist",
            "hypothesis",
            "confidence-intervals",
            "accelerate",
            "tensorboard",
            "espeakng-loader>=0.2.4",
            "peft>=0.20",
            "av>=14",
            "gradio>=6,<7",
            "fastapi",
            "uvicorn",
            "python-multipart",
            "httpx",
            # Drives the browser that the system has; none is downloaded.
            "playwright",
            "markdown-it-py",
            "nbclient",
            "nbformat",
            "ipykernel",
            "build",
            "setuptools>=77",
        ],
        "lint": ["ruff", "yamllint", "mypy", "import-linter", "pre-commit"],
        # For benchmarks/micro.py. Not in `test`: beside pytest-xdist it warns in each run.
        "bench": ["pytest-benchmark>=5"],
    },
    classifiers=[
        "License :: OSI Approved :: Apache Software License",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Multimedia :: Sound/Audio :: Speech",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
