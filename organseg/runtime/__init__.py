"""What makes a run survive: checkpoint files, signals, per-step seeds, the run folder, loggers."""
