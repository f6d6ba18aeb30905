"""The report, looked at by a browser."""
