"""Networks: Keras models (x_t, condition) → image-shaped tensor."""

from soft_diffusion_tf.networks.ncsnpp import NCSNpp

__all__ = ["NCSNpp"]
