"""Hyper-Connections and mHC for PyTorch Lightning."""

from mhc_lightning._torchvision import install_guard

__version__ = "0.1.0"

install_guard()  # before anything here imports Lightning
