"""What people look at: the report page, figures, runs compared, and numbers in words."""
