"""sandboxd: isolated agents, brokered tool calls, secrets the agent never sees."""

__version__ = "0.1.0"
