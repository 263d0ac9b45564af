"""Turns a checkpoint of the published score_sde networks into a workdir of this project.

soft-diffusion-import --checkpoint=checkpoint_24.pth --config=config.json --out=ncsnpp

A .pth needs PyTorch, `pip install "soft-diffusion-tf[import]"`; an .npz with the same tensor names
does not. The configuration is JSON with the published option names, or a Python file with
get_config(), or, for an .npz, its own config_json. VE, VP and sub-VP networks can be imported.
"""

from absl import flags

from soft_diffusion_tf import files
from soft_diffusion_tf.bin import cli

_CHECKPOINT = cli.define_path(
  "checkpoint", None, "Published checkpoint, .pth or .npz.", required=True
)
_CONFIG = cli.define_path(
  "config", None, "Its configuration, .json or .py; an .npz may have its own."
)
_OUT = cli.define_path("out", None, "Workdir to make.", required=True)
_EMA = flags.DEFINE_bool(
  "ema", True, "Sample from the averaged weights of a .pth, not the last ones."
)


def _check():
  files.check_folder(_OUT.value)


def main():
  from soft_diffusion_tf import score_sde

  out = _OUT.value
  network = score_sde.convert(_CHECKPOINT.value, _CONFIG.value, out, _EMA.value)
  print(f"wrote {network.count_params():,} parameters to {out}")
  print(f"next: soft-diffusion-sample --workdir={out} --out={out}/samples.png")


def run():
  cli.run(main, check=_check)


if __name__ == "__main__":
  run()
