"""Runs a model on calibration batches and shows the inputs of its sites to observers."""
