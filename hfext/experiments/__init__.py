"""What the recipes run: one module per experiment, each with a dataclass `Config` and `run(config, out) -> dict`."""
