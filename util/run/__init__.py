"""Running an experiment: flags, device, processes, seeds, logs, errors."""
