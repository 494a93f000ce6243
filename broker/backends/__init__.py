"""One module per back end; each implements ports of `broker.ports` and nothing else."""
