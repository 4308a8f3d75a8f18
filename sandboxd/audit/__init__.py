"""The audit log: what is allowed is on disk before it happens, and what was changed there shows.

``log`` writes, ``chain`` signs and verifies, ``worker`` is the thread that waits for the disk.
"""

from __future__ import annotations

from sandboxd.audit.chain import AuditReport, Bad, verify_log
from sandboxd.audit.log import JSON, LATEST, AuditLog

__all__ = ["JSON", "LATEST", "AuditLog", "AuditReport", "Bad", "verify_log"]
