"""What networks are trained on: one DataModule a file, each resumable exactly."""

from lightning_modules.data.data_module import HeldOut, RunData, TrixDataModule

__all__ = ["HeldOut", "RunData", "TrixDataModule"]
