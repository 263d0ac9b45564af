"""soft-diffusion-reference-stats, by the name that it had before it was installed."""

from soft_diffusion_tf.bin.reference_stats import run

if __name__ == "__main__":
  run()
