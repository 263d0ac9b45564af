"""soft-diffusion-lab, by the name that it had before it was installed."""

from soft_diffusion_tf.bin.lab import run

if __name__ == "__main__":
  run()
