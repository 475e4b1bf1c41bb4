"""Files, processes, warnings and timing: what every other package may use."""
