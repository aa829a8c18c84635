"""Semi-supervised semantic segmentation by cross-teacher training."""

__version__ = "0.1.0"
