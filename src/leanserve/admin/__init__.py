"""A process beside the workers that reads the scoreboard (a later issue)."""
