"""The paper's sampling algorithms as printed, in NumPy, one step of Δt at a time.

Arguments: x is x_t; predict is h = φ + x_t; blur(x, t) is C_t x; sigma(t); t and dt; eta is the
step's noise. Each returns x_{t−Δt}.
"""

import numpy as np


def naive(x, predict, blur, sigma, t, dt, eta):
  """Algorithm 1."""
  x0_hat = predict(x, t)
  return blur(x0_hat, t - dt) + sigma(t - dt) * eta


def momentum(x, predict, blur, sigma, t, dt, eta):
  """Algorithm 2, line by line."""
  x0_hat = predict(x, t)
  y_t = blur(x0_hat, t)
  e_t = y_t - x
  z = (
    x
    - (sigma(t - dt) ** 2 - sigma(t) ** 2) / sigma(t) ** 2 * e_t
    + np.sqrt(sigma(t) ** 2 - sigma(t - dt) ** 2) * eta
  )
  y_next = blur(x0_hat, t - dt)
  return z + (y_next - y_t)


def probability_flow(x, predict, blur, sigma, t, dt, eta):
  """Eq. 51."""
  x0_hat = predict(x, t)
  delta = (blur(x0_hat, t - dt) - blur(x0_hat, t)) - 0.5 * (
    (sigma(t - dt) ** 2 - sigma(t) ** 2) / sigma(t) ** 2
  ) * (blur(x0_hat, t) - x)
  return x + delta


def ddim(x, predict, blur, sigma, t, dt, eta, k=0.0):
  """Eq. 52."""
  x0_hat = predict(x, t)
  simulated = (x - blur(x0_hat, t)) / sigma(t)
  return blur(x0_hat, t - dt) + np.sqrt(sigma(t - dt) ** 2 - k**2) * simulated + k * eta


def ve_reverse_sde(x, predict, blur, sigma, t, dt, eta):
  """Song et al. 2021, the reverse-diffusion predictor of the VE SDE: C plays no part."""
  score = (predict(x, t) - x) / sigma(t) ** 2
  gap = sigma(t) ** 2 - sigma(t - dt) ** 2
  return x + gap * score + np.sqrt(gap) * eta
