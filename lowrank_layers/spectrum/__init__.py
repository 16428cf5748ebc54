"""Understanding a model by its singular values: of weights, activations, and what training changed."""

from .activations import (
    ActivationLayer as ActivationLayer,
    ActivationSpectrum as ActivationSpectrum,
    activation_spectrum as activation_spectrum,
)
from .advice import Advice as Advice, should_factorize as should_factorize
from .capacity import Capacity as Capacity, LayerCapacity as LayerCapacity, capacity as capacity
from .checkpoint_recorder import CheckpointRecorder as CheckpointRecorder
from .forecast import Forecast as Forecast, forecast as forecast
from .json_lines import read_spectra as read_spectra
from .leading_spectrum import LeadingSpectrum as LeadingSpectrum
from .matrix_spectrum import MatrixSpectrum as MatrixSpectrum
from .monitor import SpectrumMonitor as SpectrumMonitor
from .monitor_curves import monitor_curves as monitor_curves
from .power_law import PowerLaw as PowerLaw, fit_power_law as fit_power_law
from .record import SpectrumRecord as SpectrumRecord
from .residuals import ResidualReport as ResidualReport, residual_report as residual_report
from .trajectory import TrajectorySpectrum as TrajectorySpectrum, trajectory_spectrum as trajectory_spectrum
from .weights import (
    LayerSpectrum as LayerSpectrum,
    WeightSpectrum as WeightSpectrum,
    weight_spectrum as weight_spectrum,
)
