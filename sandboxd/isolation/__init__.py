"""The privileged half: a small launcher process that builds sandboxes, and the broker's client.

``wire`` is what both halves share, ``launcher`` and ``sandbox`` run in the privileged process,
``kernel`` holds its system calls, ``client`` is the broker's side. The privileged modules import
the standard library and nothing else.
"""
