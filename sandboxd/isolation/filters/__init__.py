"""The seccomp filter: what it allows (``calls``), how it is compiled (``build``), and the result.

``*.bpf`` are the programs that the launcher installs, one for each architecture, as
``python -m sandboxd.isolation.filters.build`` wrote them. Nothing in here runs on a user's host.
"""
