"""What takes minutes to hours: `pytest tests/slow`, which a plain `pytest` leaves out.

Each file says what it does, how long it takes on two cores, and which environment variables change
that. `pytest tests/slow -s` shows what was counted.
"""
