"""What the demo and the selftest share: a daemon for one run, and code that runs in sandboxes.

``stage`` is the daemon in a temporary directory, ``archive`` packs modules for a sandbox. ``hunt``,
``reach`` and ``mcp`` are such modules: standard library only.
"""
