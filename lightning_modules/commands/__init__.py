"""The commands other than training, each light to start: argparse in front, heavy imports only where they are used."""
