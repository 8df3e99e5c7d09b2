"""The commands beside training, each light to start: argparse in front, heavy imports only where they are used."""
