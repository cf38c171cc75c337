"""What a run's geometry is used for while it goes on: schedules, and guards of update sizes."""
