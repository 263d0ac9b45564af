"""soft-diffusion-import, by the name that it had before it was installed."""

from soft_diffusion_tf.bin.import_score_sde import run

if __name__ == "__main__":
  run()
