"""Hyperparameter sweeps and scaling laws from many short runs of one configuration."""
