"""Hostile input: a server is attacked in many ways while good clients use it.

``python -m hostile --help``, from the folder tests/. `attacks` has the table of attacks, `measure` says what
is looked at, `app` is the application under attack and `good` are the good clients.
"""
