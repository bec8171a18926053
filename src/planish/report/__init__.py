"""The report: one offline page, and the same figures as text for a terminal."""
