"""The inference engine: its own process, the only one that loads torch and owns the device."""
