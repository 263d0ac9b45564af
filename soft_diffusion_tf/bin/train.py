"""Trains a model in a workdir, or goes on where its last checkpoint stands.

soft-diffusion-train --config=digits_blur --workdir=runs/digits
"""

from absl import flags

from soft_diffusion_tf import files
from soft_diffusion_tf.bin import cli

_CONFIG = cli.define_config()
_WORKDIR = cli.define_path(
  "workdir",
  None,
  "Folder of the run; made if need be, continued if it holds this run.",
  required=True,
)
_STRATEGY = flags.DEFINE_string(
  "strategy", "auto", "Devices: auto, one_device, mirrored, multi_worker (by TF_CONFIG) or tpu."
)
_TPU = flags.DEFINE_string("tpu", "", "Name of the TPU, or 'local', for --strategy=tpu.")
_PEER_TIMEOUT = flags.DEFINE_float(
  "peer_timeout", 300.0, "Seconds to wait for the other workers of TF_CONFIG."
)
_DATA_DIR = cli.define_path("data_dir", None, "Where TFDS keeps its data sets.")
_START_ANEW = flags.DEFINE_bool(
  "start_anew",
  False,
  "Begin at step 0 in a workdir whose checkpoints are lost; its records are kept in records-1.",
)


def _check():
  cli.require_config()
  files.check_folder(_WORKDIR.value, "workdir")


def main():
  from soft_diffusion_tf import training
  from soft_diffusion_tf.training.strategies import make_strategy

  experiment = cli.experiment_of(_CONFIG.value)
  if _DATA_DIR.value:
    experiment = experiment.replace(data={"data_dir": _DATA_DIR.value})
  strategy = make_strategy(_STRATEGY.value, _TPU.value, _PEER_TIMEOUT.value)
  run = training.train(experiment, _WORKDIR.value, strategy, anew=_START_ANEW.value)
  print(f"{experiment.name}: trained to step {run.step} in {_WORKDIR.value}")
  print(
    f"next: soft-diffusion-sample --workdir={_WORKDIR.value} --out={_WORKDIR.value}/samples.png"
  )


def run():
  cli.run(main, resumable=True, check=_check)


if __name__ == "__main__":
  run()
