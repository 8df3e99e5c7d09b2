"""What networks are trained on: one DataModule a file, each resumable exactly."""
