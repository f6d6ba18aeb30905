"""Programs that measure; each prints one JSON object with the machine in it."""
