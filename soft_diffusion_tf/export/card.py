"""The model card of an exported model."""

from soft_diffusion_tf import training, trust
from soft_diffusion_tf.experiment import Sampling, options_from_config

UNSTATED = "not stated; the terms of the training data apply"


def card(run, manifest, evaluations=()):
  """The model card, Markdown: what the model is, how it was made, what was measured."""
  e, d = run.experiment, run.diffusion
  level, sigma = (
    "{:.4g} to {:.4g}".format(*schedule([0.0, 1.0]).numpy()) for schedule in (d.level, d.sigma)
  )
  size, weights = " × ".join(map(str, d.image_shape)), training.spell_weights(run.weights)
  lines = [
    f"# {e.name}",
    "",
    f"A Soft Diffusion model (Daras et al. 2022) of {size} images, made by soft-diffusion-tf "
    f"{manifest['version']}.",
    "",
    "| | |",
    "|---|---|",
    f"| corruption | {type(e.corruption).__name__}, level {level} |",
    f"| noise σ | {sigma} |",
    f"| prior at t = 1 | {d.prior.kind} |",
    f"| network | NCSN++, {manifest['parameters']:,} parameters, averaged weights ({weights}) |",
    f"| trained on | {e.data.name}, split {e.data.train_split}, {manifest['step']:,} steps of "
    f"{e.training.batch_size} images, seed {e.seed} |",
    f"| config digest | {manifest['config']} |",
    f"| weights, SHA-256 | {manifest['weights_sha256']} |",
    f"| {manifest.get('dtype_of', 'computes in')} | {manifest['dtype']} |",
    f"| licence of the weights | {manifest['licence']} |",
    "",
    "## Measured",
    "",
  ]
  train = {
    "data": str(e.data.name),
    "split": e.data.train_split,
    "crop": e.data.crop,
    "image_shape": list(e.data.image_shape),
  }
  records = [
    r
    for r in evaluations
    if r.get("step") == manifest["step"]
    and train.items() <= r.get("reference", {}).items()
    and training.spell_weights({"ema_decay": e.training.ema_decay} | r) == weights
  ]
  if records:
    lines += [
      "Fréchet distance of samples to training images; the floor is the same between two sets of "
      "real images.",
      "",
      "| sampler | NFE | images | distance | floor |",
      "|---|---|---|---|---|",
    ]
    rows = []
    for r in records:
      floor = "–" if r.get("floor") is None else f"{r['floor']['value']:.4g}"
      rows.append(
        f"| {_summary(r)} | {r['nfe']} | {r['samples']} | {r['label']} {r['value']:.4g} | {floor} |"
      )
    lines += dict.fromkeys(rows)  # the same evaluation made twice is one row
  else:
    lines.append("Not evaluated against its training images.")
  lines += ["", "## Use and limits", "", _LIMITS.format(data=e.data.name), ""]
  if run.remark:
    lines += [f"Of the weights: {run.remark.partition(';')[0]}.", ""]
  if manifest.get("signatures"):
    lines += ["## Signatures", "", "| signature | inputs | outputs |", "|---|---|---|"]
    for name, s in sorted(manifest["signatures"].items()):
      lines.append(f"| {name} | {_spell(s['inputs'])} | {_spell(s['outputs'])} |")
    lines.append("")
  return "\n".join(lines)


_LIMITS = (
  "For study of diffusion with general corruptions. Samples and restorations look like the "
  "training data ({data}) and carry its gaps and biases: what a restoration adds is plausible, not "
  "evidence. Not for decisions about people."
)


def _spell(specs):
  return ", ".join(
    f"{name} {s['dtype']} [{', '.join('N' if n is None else str(n) for n in s['shape'])}]"
    for name, s in specs.items()
  )


def _summary(record):
  """What an evaluation sampled by; the sampler alone where its code is not trusted."""
  try:
    return options_from_config(Sampling, record["sampling"]).summary
  except trust.UntrustedCode:
    return record["sampler"]
