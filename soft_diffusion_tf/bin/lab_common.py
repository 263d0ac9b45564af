"""What the laboratory's programs share: their processes, tables and curves."""

COLOURS = {
  "naive": "tab:gray",
  "momentum": "tab:red",
  "probability_flow": "tab:orange",
  "ddim": "tab:green",
  "predictor_corrector": "tab:olive",
  "ancestral": "tab:pink",
  "two_step": "tab:blue",
  "stochastic_two_step": "tab:purple",
  "heun": "tab:brown",
  "langevin": "tab:cyan",
}


def corruption_of(name):
  """The corruption of --corruption=name."""
  from soft_diffusion_tf import corruptions

  if ":" in name:
    return corruptions.from_config({"kind": name}, trust_code=True)
  kinds = {
    "blur": corruptions.GaussianBlur(),
    "heat": corruptions.HeatDissipation(),
    "mask": corruptions.Mask(),
    "soft_mask": corruptions.Mask(edge=1.0),
    "ve": corruptions.Identity(),
  }
  if name not in kinds:
    raise ValueError(
      f"unknown corruption {name!r}; choose one of {', '.join(kinds)} or module:Class"
    )
  return kinds[name]


def make_lab(
  name,
  images,
  labels,
  *,
  schedule="transport",
  prior="",
  components="image",
  std=0.05,
  count=1000,
  error=None,
):
  """A `Laboratory` of one of the project's processes on images."""
  from soft_diffusion_tf import diffusion, laboratory, schedules

  shape, corruption = images.shape[1:], corruption_of(name)
  if name == "ve":
    process = diffusion.Diffusion(
      shape, corruption, schedules.Constant(0.0), schedules.Geometric(0.01, 50.0)
    )
  else:
    first = 0.01 if name in ("blur", "heat") else corruption.level_range[0]
    last = laboratory.strongest(corruption, shape[0])
    level, _ = laboratory.level_schedule(schedule, corruption, first, last, images)
    process = laboratory.two_stage(corruption, level, shape)
  prior = prior or ("subspace" if name in ("blur", "heat") else "zero")
  mixture = laboratory.mixture_of(images, labels, components, std)
  return laboratory.Laboratory(mixture, process, images, prior, count=count, error=error)


def table(header, rows):
  """A Markdown table."""
  lines = ["| " + " | ".join(map(str, header)) + " |", "|" + "---|" * len(header)]
  return "\n".join(lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows])


def number(value):
  if value is None:
    return "–"
  return f"{value:.3g}" if abs(value) < 1000 else f"{value:.1e}"


def curves(axis, lines, floor=None, title="", ylabel=""):
  """Distance against evaluations, log-log: {name: [(nfe, value)]}."""
  for name, points in lines.items():
    dashed = name == "naive"
    axis.plot(
      *zip(*points),
      marker="o",
      markersize=3,
      linewidth=1.3,
      color=COLOURS.get(name),
      label=name.replace("_", " "),
      linestyle="--" if dashed else "-",
    )
  if floor:
    axis.axhline(floor, color="black", linewidth=0.8, linestyle=":", label="floor")
  axis.set(xscale="log", yscale="log", xlabel="evaluations of the denoiser", title=title)
  axis.set_ylabel(ylabel)
  ticks = sorted({x for points in lines.values() for x, _ in points if x % 5 == 0})
  axis.set_xticks(ticks, [str(x) for x in ticks])
  axis.minorticks_off()
  axis.grid(alpha=0.3, linewidth=0.4)


def save(figure, path):
  import matplotlib.pyplot as plt

  figure.tight_layout()
  figure.savefig(path, dpi=85, metadata={"Software": None})
  plt.close(figure)
