"""Spectra of operators: eigenvalues, their density, traces and determinants by sampling, inertia along a training run.

Small or structured operators have exact eigenvalues; whatever is too large for that is known by its products, and read by
Lanczos' method and random probes (through matfree). Every estimate tells its standard error, and the same key gives the
same result.
"""

from jaxhess.spectra.density import Density, exact_density, spectral_density
from jaxhess.spectra.eigenvalues import Spectrum, spectra_by_block, spectrum
from jaxhess.spectra.estimates import Estimate, stochastic_logdet, stochastic_trace
from jaxhess.spectra.inertia import InertiaHistory, inertia_by_block

__all__ = [
    "Density",
    "Estimate",
    "InertiaHistory",
    "Spectrum",
    "exact_density",
    "inertia_by_block",
    "spectra_by_block",
    "spectral_density",
    "spectrum",
    "stochastic_logdet",
    "stochastic_trace",
]
