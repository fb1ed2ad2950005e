"""What the application is told and what it says."""
