"""Custody of secrets: key sources, envelope encryption, the store, and the vault over them."""

from sandboxd.vault.custody import KeySource, MasterKey, create_key_file, load_master_key
from sandboxd.vault.store import SessionRecord
from sandboxd.vault.vault import Sealed, Snapshot, TeamVault, Variable, Vault

__all__ = [
    "KeySource",
    "MasterKey",
    "Sealed",
    "SessionRecord",
    "Snapshot",
    "TeamVault",
    "Variable",
    "Vault",
    "create_key_file",
    "load_master_key",
]
