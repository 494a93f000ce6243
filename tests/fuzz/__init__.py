"""What strangers may send: bytes to the front end, messages in the queue, records in the store, answers of containers.

In CI the same cases are tried each time. `make fuzz SECONDS=300` tries others, and prints what repeats them.
"""
