"""Stands before the real numpy on the path of a server that is to be measured without it."""

raise ImportError("numpy is hidden for this measurement")
