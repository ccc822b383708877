"""The release and its privacy statement, progress, tables and plots."""
