"""Helps whoever writes a tool: a folder to start from, and a run that shows what it needs."""
