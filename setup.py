"""Package metadata and dependency ranges; exact versions live in requirements.lock."""

import pathlib
import re

import setuptools

HERE = pathlib.Path(__file__).parent
VERSION = re.search(
  r'^__version__ = "(.+)"$', (HERE / "soft_diffusion_tf/__init__.py").read_text("utf-8"), re.M
)[1]
TFDS = [  # data sets of TFDS
  "tensorflow-datasets>=4.9.10,<4.10",
  "importlib-resources>=6",  # tensorflow-datasets imports it without declaring it
]
ADAPTIVE = [  # the sampler dormand_prince
  "tensorflow-probability>=0.25,<0.26",
  "tf-keras>=2.20,<2.22",  # tensorflow-probability needs it beside Keras 3
]
EVALUATION = [  # evaluation/distances.py loads one module of TF-GAN, which imports TFP
  "tensorflow-gan==2.1.0",
  *ADAPTIVE,
]
SERVE = ["uvicorn>=0.35,<1"]  # serving/app.py subclasses its h11 protocol; tests hold it
ALL = [*TFDS, *EVALUATION, *SERVE]
DOCS = ["mkdocs>=1.6,<2", "mkdocstrings[python]>=0.30,<2"]

setuptools.setup(
  name="soft-diffusion-tf",
  version=VERSION,
  description="Soft Diffusion (score matching with general corruptions) in TensorFlow 2 / Keras 3",
  long_description=(HERE / "README.md").read_text(encoding="utf-8"),
  long_description_content_type="text/markdown",
  license="Apache-2.0",
  python_requires=">=3.11,<3.14",
  # The top-level folder configs/ goes into the package: see soft_diffusion_tf/shipped.py.
  packages=[
    *setuptools.find_packages(include=["soft_diffusion_tf", "soft_diffusion_tf.*"]),
    "soft_diffusion_tf.configs",
  ],
  package_dir={"soft_diffusion_tf.configs": "configs"},
  package_data={
    "soft_diffusion_tf": ["pretrained/*", "py.typed"],
    "soft_diffusion_tf.serving": ["page/*"],
    "soft_diffusion_tf.bin": ["*.md"],
    "soft_diffusion_tf.configs": ["schedules/*.json"],
  },
  install_requires=[
    "tensorflow>=2.20,<2.22",
    "keras>=3.10,<3.16",  # optimizer.py overrides one private hook; a test holds it
    "absl-py>=2.1",
    "ml-collections>=1.1,<2",
    "numpy>=2.0,<3",
    "scipy>=1.14,<2",
    "scikit-learn>=1.5,<2",  # the built-in digits
    "pillow>=10",
    "tensorboard>=2.20,<2.22",
    "tqdm>=4.66",
    "threadpoolctl>=3.5",
    "matplotlib>=3.9,<4",
  ],
  extras_require={
    "all": ALL,
    "tfds": TFDS,
    "evaluation": EVALUATION,
    "adaptive": ADAPTIVE,
    "serve": SERVE,
    "test": [
      *ALL,
      "pytest>=8,<10",
      "pytest-xdist>=3.6,<4",
      "ruff>=0.12",
      "mypy>=1.15",
      "nbclient>=0.10,<1",  # runs the notebook
      "ipykernel>=6.29,<8",
      "scikit-image>=0.24,<0.27",
      *DOCS,
    ],
    "docs": DOCS,
    "restoration": ["scikit-image>=0.24,<0.27"],  # tools/measure_restoration.py, its baselines
    "import": ["torch>=2.4"],  # soft-diffusion-import, for .pth files alone
  },
  entry_points={
    "console_scripts": [
      "soft-diffusion-train=soft_diffusion_tf.bin.train:run",
      "soft-diffusion-sample=soft_diffusion_tf.bin.sample:run",
      "soft-diffusion-evaluate=soft_diffusion_tf.bin.evaluate:run",
      "soft-diffusion-export=soft_diffusion_tf.bin.export:run",
      "soft-diffusion-restore=soft_diffusion_tf.bin.restore:run",
      "soft-diffusion-serve=soft_diffusion_tf.bin.serve:run",
      "soft-diffusion-schedule=soft_diffusion_tf.bin.schedule:run",
      "soft-diffusion-reference-stats=soft_diffusion_tf.bin.reference_stats:run",
      "soft-diffusion-lab=soft_diffusion_tf.bin.lab:run",
      "soft-diffusion-data=soft_diffusion_tf.bin.data:run",
      "soft-diffusion-ema=soft_diffusion_tf.bin.ema:run",
      "soft-diffusion-import=soft_diffusion_tf.bin.import_score_sde:run",
    ],
  },
  classifiers=[
    "License :: OSI Approved :: Apache Software License",
    "Programming Language :: Python :: 3.11",
    "Programming Language :: Python :: 3.12",
    "Programming Language :: Python :: 3.13",
    "Topic :: Scientific/Engineering :: Artificial Intelligence",
  ],
)
