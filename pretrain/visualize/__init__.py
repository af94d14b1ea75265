"""Figures of runs: reconstructions, loss curves and contact sheets."""
