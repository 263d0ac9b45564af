"""Fréchet distance of a trained model's samples to real images, beside its floor.

soft-diffusion-evaluate --workdir=runs/digits --samples=700
"""

import dataclasses
import json
import pathlib

from absl import flags

from soft_diffusion_tf.bin import cli

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a training run.", required=True)
_SAMPLES = flags.DEFINE_integer("samples", None, "Images on each side, instead of the config's.")
_SPLIT = flags.DEFINE_string(
  "split", None, "Split of the real images; by default the training one."
)
_FEATURE_NET = flags.DEFINE_string(
  "feature_net", None, "'pixels', 'tfgan' or a SavedModel folder, instead of the config's."
)
_SAMPLER = flags.DEFINE_string("sampler", None, "Sampler instead of the config's.")
_STEPS = flags.DEFINE_integer("steps", None, "Number of steps instead of the config's.")
_DATA_DIR = flags.DEFINE_string("data_dir", None, "Where TFDS keeps its data sets.")


def main():
  from soft_diffusion_tf import data, evaluation, training

  run = training.load(_WORKDIR.value)
  e = run.experiment
  options = run.options(sampler=_SAMPLER.value, steps=_STEPS.value)
  network = evaluation.feature_network(_FEATURE_NET.value or e.evaluation.feature_net)
  source = data.load(
    e.data.name, _SPLIT.value or e.data.train_split, e.data.image_shape, e.data.crop,
    _DATA_DIR.value or e.data.data_dir or None,
  )  # fmt: skip
  count = e.evaluation.samples if _SAMPLES.value is None else _SAMPLES.value
  result = evaluation.evaluate(run, source.images, count, network, options)
  record = {
    "step": run.step, "sampler": options.sampler, "steps": options.steps, "samples": count,
    "feature_net": network.name, "feature_net_sha256": network.digest,
    **dataclasses.asdict(result["distance"]),
    "floor": result["floor"].value if result["floor"] else None,
  }  # fmt: skip
  with open(pathlib.Path(_WORKDIR.value) / "evaluations.jsonl", "a") as file:
    file.write(json.dumps(record) + "\n")
  print(
    f"step {run.step}, {options.sampler}, {options.steps} steps, N = {count}: {result['distance']}"
  )
  print(f"floor (real against real): {result['floor'] or 'needs more real images'}")


def run():
  cli.run(main)


if __name__ == "__main__":
  run()
