"""Calibration without a plan: a model is observed, fitted and checked while it serves."""
