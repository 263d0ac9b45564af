"""Networks: Keras models (x_t, condition) → image-shaped tensor, and the seam for one's own."""

from soft_diffusion_tf.networks.architecture import Architecture
from soft_diffusion_tf.networks.ncsnpp import NCSNpp, Network

__all__ = ["Architecture", "NCSNpp", "Network"]
