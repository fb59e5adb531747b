"""The parts of a run as Ray actors. `actors.app` builds the system from a config."""
