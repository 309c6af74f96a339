"""Who is calling. Knows no adapters and no engine."""
