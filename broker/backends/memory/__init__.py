"""All data ports in one process: `fnqueue dev`, and the reference reading of each port."""
