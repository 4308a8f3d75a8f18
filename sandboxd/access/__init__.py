"""Who may do what: API keys, the tokens made with them, roles."""
