"""The command line: ``lowrank``, or ``python -m lowrank_layers``, one file per command."""

from .main import main as main
