"""soft-diffusion-schedule, by the name that it had before it was installed."""

from soft_diffusion_tf.bin.schedule import run

if __name__ == "__main__":
  run()
