"""Everything that runs GPU work: the sidecar, the controller, the launchers."""
