"""The real verbs and the real sidecar over the memory back ends, in virtual time, with faults at known steps."""
