"""Latency that is measured: layers and their replacements timed inside the running model, and plans made by that."""

from .fit import fit_latency as fit_latency
from .run import ExampleRun as ExampleRun
from .table import LatencyTable as LatencyTable
