"""hrf_kernels: the Gaussian log-prob, the ratio and its clip of a denoising policy.

The trainer calls these names only. They are the plain torch of reference.py; a faster implementation comes in here,
behind the same signatures, and is held to it.
"""

from hrf_kernels.coefficients import StepCoefficients
from hrf_kernels.philox import philox_normal
from hrf_kernels.reference import Surrogate, clipped_surrogate, gaussian_log_prob, gaussian_mean, gaussian_step

__all__ = [
    "StepCoefficients",
    "Surrogate",
    "clipped_surrogate",
    "gaussian_log_prob",
    "gaussian_mean",
    "gaussian_step",
    "philox_normal",
]
