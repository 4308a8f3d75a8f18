"""The demo's hostile agent: packed into one archive, and run in a real session.

Standard library only; it shares no code with the rest of the package, and it knows of the secret
only what it looks like.
"""
